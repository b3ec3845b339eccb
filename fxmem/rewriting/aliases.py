"""Which values of generated code may share memory, and which nodes write into it.

Operators say it in their schema, functions of ours in their declaration
(:class:`~fxmem.program.body_op.BodyOp`). Of any other function the worst is taken to be true.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from fxmem._compat import graph as _compat
from fxmem.program.body_op import BODY_OPS, NUMBERS


def _at(node: fx.Node, positions: Collection[int]) -> list[fx.Node]:
    return [a for i, a in enumerate(node.args) if i in positions and isinstance(a, fx.Node)]


def shared_operands(node: fx.Node) -> list[fx.Node]:
    """Operands whose memory the result of ``node`` may share."""
    if node.op in ("placeholder", "get_attr", "output") or node.target in NUMBERS:
        return []
    if isinstance(node.target, _compat.OpOverload):
        return node.all_input_nodes[:1] if _compat.may_alias(node) else []
    known = BODY_OPS.get(node.target)
    return node.all_input_nodes if known is None else _at(node, known.aliases)


def written(node: fx.Node) -> list[fx.Node]:
    """Operands that ``node`` writes into."""
    if node.op in ("placeholder", "get_attr", "output") or node.target in NUMBERS:
        return []
    if isinstance(node.target, _compat.OpOverload):
        return _written_by_operator(node)
    known = BODY_OPS.get(node.target)
    return node.all_input_nodes if known is None else _at(node, known.writes)


def _written_by_operator(node: fx.Node) -> list[fx.Node]:
    assert isinstance(node.target, _compat.OpOverload)
    if not node.target._schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for i, argument in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [a for a in _compat.tree_leaves(given) if isinstance(a, fx.Node)]
    return found


def sources(value: fx.Node) -> set[fx.Node]:
    """``value`` and the values whose memory it may share."""
    found, stack = {value}, [value]
    while stack:
        fresh = set(shared_operands(stack.pop())) - found
        found |= fresh
        stack += fresh
    return found


def views(value: fx.Node) -> set[fx.Node]:
    """Values made from ``value`` that may share its memory."""
    found: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        fresh = {u for u in node.users if node in shared_operands(u)} - found
        found |= fresh
        stack += fresh
    return found


def readers(value: fx.Node) -> set[fx.Node]:
    """Nodes that use ``value`` or a view of it."""
    return {u for v in (value, *views(value)) for u in v.users}


def memory_read(values: Iterable[object]) -> set[fx.Node]:
    """Values whose memory is read where these operands are."""
    return {s for v in values if isinstance(v, fx.Node) for s in sources(v)}


def written_between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """Values whose memory is written after ``first`` and before ``last``."""
    found, node = set(), first.next
    while node is not last:
        found |= memory_read(written(node))
        node = node.next
    return found


def has_effect(node: fx.Node) -> bool:
    """Its call does more than make a result: it writes what is an argument or is read later."""
    if node.op in ("placeholder", "output"):
        return True
    memory = memory_read(written(node))
    return any(s.op == "placeholder" or any(node < u for u in readers(s)) for s in memory)


def written_arguments(graph: fx.Graph) -> set[str]:
    """Names of the arguments of a body whose memory it writes."""
    memory = memory_read(w for n in graph.nodes for w in written(n))
    return {str(s.target) for s in memory if s.op == "placeholder"}


def storages(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """Value -> the node of this body that made its storage; None where it is not the body's own or
    may have aliases that are not followed.
    """
    out: dict[fx.Node, fx.Node | None] = {}
    hidden: set[fx.Node | None] = set()
    for n in graph.nodes:
        shared = shared_operands(n)
        operator = isinstance(n.target, _compat.OpOverload)
        followed = n.target in BODY_OPS and len(shared) <= 1
        if operator:
            followed = len(n.target._schema.returns) == 1 and not n.target._schema.is_mutable
        if followed:
            out[n] = out.get(shared[0]) if shared else n if operator else None
        else:
            out[n] = None
            if n.users:
                hidden.update(map(out.get, shared))
    return {n: None if root in hidden else root for n, root in out.items()}
