"""Subgraphs: every call of captured bodies becomes a node that the trace of a region can run.

Bodies that say nothing but "run this" are inlined. A ``torch.autograd.Function`` keeps its own
forward and backward, ops between the begin and the end of a function transform (``vmap``,
``torch.func.grad``) become one call. Other higher-order ops have control flow of their own and are
refused by name.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem.errors import MutationError, UnsupportedOpError
from fxmem.frontend.capture import value_of
from fxmem.frontend.origin import module_path, source_line, stack_of
from fxmem.frontend.subgraph import Body, CustomFunction, Span, Subgraph
from fxmem.passes.functionalize import Functionalize, writes
from fxmem.passes.inline_bodies import InlineBodies
from fxmem.passes.piece_borders import check_outside
from fxmem.passes.positional_arguments import PositionalArguments
from fxmem.rewriting.pipeline import Required, copy_graph


@dataclass(frozen=True, slots=True)
class Subgraphs(Required):
    """Replace custom functions and transformed spans; refuse other higher-order ops."""

    name: str = "subgraphs"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = InlineBodies().run(gm)
        if not _spans(list(gm.graph.nodes)) and not _higher_order(gm):
            return gm
        gm = copy_graph(gm)
        for nodes in _spans(list(gm.graph.nodes)):
            _enclose(gm, nodes)
        for node in _higher_order(gm):
            _custom(gm, node)
        gm.recompile()
        return gm


def _higher_order(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        n for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.target, _compat.HigherOrderOperator)
    ]  # fmt: skip


def _custom(gm: fx.GraphModule, node: fx.Node) -> None:
    """Replace a call ``(forward, backward, *operands)`` of a custom function."""
    if not _compat.is_custom_function(node):
        raise _refusal(node)
    if node.kwargs.get("dirty_idx"):
        raise MutationError(
            "an autograd.Function that changes its input (ctx.mark_dirty)", op=str(node.target),
            module=module_path(node), source=source_line(node),
            advice="return a new tensor from its forward instead",
        )  # fmt: skip
    bodies = node.args[:2]
    forward, backward = (_body(getattr(gm, str(b.target))) for b in bodies)
    fixed: Any = node.kwargs["non_differentiable_idx"]
    _replace(gm, node, CustomFunction(forward, backward, fixed), node.args[2:])
    for b in bodies:
        if isinstance(b, fx.Node) and not b.users:
            gm.graph.erase_node(b)


def _refusal(node: fx.Node) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"higher-order op `{node.target}`", op=str(node.target), module=module_path(node),
        source=source_line(node),
        advice="write it with plain tensor ops, or call it outside the transformed model",
    )  # fmt: skip


def _body(gm: fx.GraphModule) -> Body:
    check_outside(gm.graph.nodes)
    return Body.of(Functionalize().run(PositionalArguments().run(Subgraphs().run(gm))))


def _replace(gm: fx.GraphModule, node: fx.Node, target: Subgraph, args: Sequence[Any]) -> None:
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(target, tuple(args))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _spans(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Stretches under a function transform, nested ones within the outermost, and until no value
    of the transform is read any more.
    """
    at = {node: i for i, node in enumerate(nodes)}
    found: list[list[fx.Node]] = []
    depth, last = 0, -1
    for i, node in enumerate(nodes):
        step = _compat.transform_step(node)
        if depth == 0 and step == 1 and i > last:
            found.append([])
        if depth or step or i <= last:
            found[-1].append(node)
        depth += step
        if _compat.is_transformed(value_of(node)):
            last = max([last, *(at[u] for u in node.users)])
    return found


def _check_span(nodes: Sequence[fx.Node], learns: bool) -> None:
    """``learns``: a gradient may pass through the span."""
    forwards = _forwards()
    check_outside(nodes)
    for node in nodes:
        if isinstance(node.target, _compat.HigherOrderOperator):
            raise _refusal(node)
        if writes(node):
            raise MutationError(
                f"in-place write `{node.target}` under a function transform such as vmap",
                op=str(node.target), module=module_path(node), source=source_line(node),
                advice="use the out-of-place form",
            )  # fmt: skip
        if learns and (name := _function_of(node, forwards)) is not None:
            # Dynamo keeps the forward alone there
            raise UnsupportedOpError(
                f"autograd.Function `{name}` under a function transform such as vmap", op=name,
                module=module_path(node), source=source_line(node),
                advice="call it outside vmap and torch.func.grad",
            )  # fmt: skip
        if _compat.is_forward_mode(node):
            raise UnsupportedOpError(
                "forward-mode derivative `torch.func.jvp`", op="jvp", module=module_path(node),
                source=source_line(node) or source_line(nodes[-1].next),
                advice="use torch.func.grad or torch.func.vjp, or call it outside the transformed "
                "model",
            )  # fmt: skip


def _forwards() -> list[tuple[str, range, str]]:
    """File and lines of the forward of every ``torch.autograd.Function``, and its name."""
    found, todo = [], [torch.autograd.Function]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        code = getattr(inspect.unwrap(cls.forward), "__code__", None)
        if code is not None and "forward" in vars(cls):
            last = max(line or 0 for *_, line in code.co_lines())
            found.append((code.co_filename, range(code.co_firstlineno, last + 1), cls.__name__))
    return found


def _function_of(node: fx.Node, forwards: Sequence[tuple[str, range, str]]) -> str | None:
    """The function of the user's in whose forward the node stands."""
    lines = stack_of(node)
    return next(
        (name for line in lines for file, rows, name in forwards
         if line.file == file and line.number in rows), None,
    )  # fmt: skip


def _enclose(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """One call in place of ``nodes``, which follow one another."""
    inside = set(nodes)
    given = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    results = [n for n in nodes if any(u not in inside for u in n.users)]
    values = [value_of(a) for a in given]
    _check_span(nodes, any(isinstance(v, torch.Tensor) and v.requires_grad for v in values))
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for a in given:
        env[a] = graph.placeholder(a.name)
        env[a].meta = dict(a.meta)
    for n in nodes:
        env[n] = graph.node_copy(n, lambda a: env[a])
    graph.output(tuple(env[n] for n in results))
    body = Body.of(fx.GraphModule(gm, graph))
    after = nodes[-1].next
    with gm.graph.inserting_before(after):
        call = gm.graph.call_function(Span(body), tuple(given))
        call.meta = {k: v for k, v in nodes[-1].meta.items() if k != "example_value"}
        call.meta["example_value"] = tuple(value_of(n) for n in results)
        for i, n in enumerate(results):
            item = gm.graph.call_function(operator.getitem, (call, i))
            item.meta = dict(n.meta)
            n.replace_all_uses_with(item, lambda user: user not in inside)
    for n in reversed(nodes):
        gm.graph.erase_node(n)
