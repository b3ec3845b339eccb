"""Updates inside a backward program: each weight changes as soon as nothing reads it any more.

A program that runs in one chunk forms every weight gradient in one product. This pass takes the
accumulator of such a gradient out of the program and puts an update in its place, after the last
node of the body that reads the weight or a view of it. So one gradient is alive at a time, and for
plain SGD none: the product is added to the weight (as LOMO does, Lv et al. 2023, but at the old
weights throughout). An in-place write has no data edge to the readers of what it overwrites, so
their order is checked once more on the result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, fx

from fxmem import _compat, runtime
from fxmem.errors import VerificationError
from fxmem.kernels import calls
from fxmem.program import Free, Loop, Program, Straight


class Sink(Protocol):
    """Takes the gradient of one weight instead of an accumulator.

    ``product``: it is ``a @ b``; ``value``: it is given; ``total``: ``add(acc, *args)`` adds it to
    ``acc``.
    """

    def product(self, a: Tensor, b: Tensor) -> None: ...
    def value(self, grad: Tensor) -> None: ...
    def total(self, add: Callable[..., None], *args: Any) -> None: ...


def update_mm(sink: Sink, a: Tensor, b: Tensor) -> None:
    """The gradient is ``a @ b``."""
    sink.product(a, b)


def update(sink: Sink, grad: Tensor) -> None:
    sink.value(grad)


def update_bmm(sink: Sink, *args: Any) -> None:
    sink.total(runtime.add_bmm, *args)


def update_embedding(sink: Sink, *args: Any) -> None:
    sink.total(runtime.add_embedding, *args)


def update_expert_weight(sink: Sink, *args: Any) -> None:
    sink.total(runtime.add_expert_weight, *args)


_FORMS: dict[Any, Callable[..., None]] = {
    runtime.add: update,
    runtime.add_mm: update_mm,
    calls.weight_grad: update_mm,
    runtime.add_bmm: update_bmm,
    runtime.add_embedding: update_embedding,
    runtime.add_expert_weight: update_expert_weight,
}

_PLAIN = (runtime.add, runtime.add_mm, calls.weight_grad)

_WRITERS = frozenset({runtime.put, runtime.plus_mm, *_FORMS})
_FIRST = frozenset({runtime.take, runtime.contiguous, runtime.plus_mm, operator.getitem})
_VIEWS = frozenset({"aten.t.default", "aten.reshape.default", "aten.view.default"})


@dataclass(slots=True)
class Updating:
    """``program`` takes one more input per entry of ``positions``: the sink of that gradient.

    ``flipped``: the product is the transpose of the gradient; otherwise it has the weight's shape,
    or its elements in order.
    """

    program: Program
    positions: list[int]
    flipped: list[bool]


@dataclass(slots=True)
class _Path:
    """From an accumulator to the gradient that the program returns: views in straight code."""

    accumulator: str
    names: set[str]
    flipped: bool
    straight: int | None = None
    reshaped: bool = False


def update_in_backward(program: Program, positions: Sequence[int]) -> Updating:
    """Consume the gradients at ``positions`` inside ``program`` where that can be.

    The rest stay outputs: gradients that several loops add up, and of weights that a later step
    reads. The given program is left as it is.
    """
    out = Updating(replace(program, name=f"{program.name}_update"), [], [])
    for position in positions:
        _consume(out, position)
    return out


def _consume(out: Updating, position: int) -> None:
    program = out.program
    name, weight = program.outputs[position], program.inputs[position]
    path = _path(program, name) if name is not None else None
    if path is None or program.outputs.count(name) > 1:
        return
    aliases = _aliases(program, weight)
    where = _loop_of(program, path, aliases)
    if where is None:
        return
    steps = list(program.steps)
    loop = steps[where]
    assert isinstance(loop, Loop)
    module = _rewritten(loop, path, aliases)
    if module is None:
        return
    allocate = [b for b in loop.allocate if b.name != path.accumulator]
    steps[where] = replace(loop, module=module, allocate=allocate)
    if path.straight is not None:
        straight = steps[path.straight]
        assert isinstance(straight, Straight)
        steps[path.straight] = _without(straight, path.names)
    steps = [
        Free([n for n in s.names if n not in path.names]) if isinstance(s, Free) else s
        for s in steps
    ]
    outputs = [None if i == position else o for i, o in enumerate(program.outputs)]
    inputs = [*program.inputs, path.accumulator]
    out.program = replace(program, inputs=inputs, steps=steps, outputs=outputs)
    out.positions.append(position)
    out.flipped.append(path.flipped)


def _path(program: Program, name: str) -> _Path | None:
    """How the output ``name`` comes from one accumulator, or None where it does not."""
    for at, step in enumerate(program.steps):
        if isinstance(step, Loop) and any(b.name == name and b.zero for b in step.allocate):
            return _Path(name, {name}, False)
        if isinstance(step, Straight) and name in step.results:
            return _through(step, at, name)
    return None


def _through(step: Straight, at: int, name: str) -> _Path | None:
    results, tensors = _results(step), _tensors(step.module.graph, step.tensors)
    node, flips, chain = results[step.results.index(name)], 0, set()
    while isinstance(node, fx.Node) and str(node.target) in _VIEWS:
        if flips % 2 and str(node.target) != "aten.t.default":
            return None
        flips += str(node.target) == "aten.t.default"
        chain.add(node)
        node = node.args[0]
    sources = [n for n, p in tensors.items() if p is node]
    if not sources:
        return None
    chain.add(node)
    reshaped = any(str(n.target) in _VIEWS - {"aten.t.default"} for n in chain)
    names = {r for r, n in zip(step.results, results, strict=True) if n in chain}
    inner = {u for n in chain for u in n.users if u.op != "output"}
    if not inner <= chain:
        return None
    return _Path(sources[0], names | set(sources), bool(flips % 2), at, reshaped)


def _aliases(program: Program, weight: str) -> set[str]:
    """Names of the weight and of views of it that straight code makes."""
    found = {weight}
    for step in program.steps:
        if isinstance(step, Straight):
            tensors = _tensors(step.module.graph, step.tensors)
            views = {v for n, p in tensors.items() if n in found for v in _views(p)}
            found |= {
                r for r, n in zip(step.results, _results(step), strict=True)
                if n in views or n in {tensors[t] for t in found if t in tensors}
            }  # fmt: skip
    return found


def _loop_of(program: Program, path: _Path, aliases: set[str]) -> int | None:
    """The loop that makes the sum, if the sum goes nowhere else and no later step reads the weight.

    Straight code that only makes views reads nothing, but its views are read later.
    """
    where: int | None = None
    for i, step in enumerate(program.steps):
        if isinstance(step, Free):
            continue
        if isinstance(step, Loop) and any(
            b.name == path.accumulator and b.zero for b in step.allocate
        ):
            where = i
        elif (
            i != path.straight
            and not path.names.isdisjoint(step.tensors)
            or where is not None
            and not aliases.isdisjoint(step.tensors)
        ):
            return None
    return where


def _without(step: Straight, names: set[str]) -> Straight:
    """The step without results ``names`` and what only they need."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(step.module.graph, {}))
    (output,) = graph.find_nodes(op="output")
    keep = [i for i, r in enumerate(step.results) if r not in names]
    output.args = (tuple(output.args[0][i] for i in keep),)
    tensors = _tensors(graph, step.tensors)
    graph.eliminate_dead_code()
    for node in tensors.values():
        if not node.users:
            graph.erase_node(node)
    left = [t for t in step.tensors if tensors[t].users]
    results = [step.results[i] for i in keep]
    return replace(step, module=fx.GraphModule(step.module, graph), tensors=left, results=results)


def _results(step: Straight) -> list[Any]:
    (output,) = step.module.graph.find_nodes(op="output")
    return list(output.args[0])


def _tensors(graph: fx.Graph, names: Sequence[str]) -> dict[str, fx.Node]:
    """The placeholders of the tensor arguments, which come last."""
    given = list(graph.find_nodes(op="placeholder"))
    return dict(zip(names, given[len(given) - len(names) :], strict=True))


def _rewritten(loop: Loop, path: _Path, aliases: set[str]) -> fx.GraphModule | None:
    """The body with an update in place of the accumulation, or None where it has another form."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(loop.module.graph, {}))
    tensors = _tensors(graph, loop.tensors)
    for n in graph.find_nodes(op="placeholder"):
        if n not in tensors.values():
            n.meta["int"] = True
    acc = tensors[path.accumulator]
    (node, *others) = acc.users
    if others or node.target not in _FORMS or node.args[0] is not acc:
        return None
    if path.reshaped and node.target not in _PLAIN:
        return None
    weights = [tensors[t] for t in loop.tensors if t in aliases]
    readers = {r for w in weights for v in (w, *_views(w)) for r in v.users}
    if node in readers:
        return None
    node.target = _FORMS[node.target]
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max([*readers, node], key=order.__getitem__)
    if last is not node:
        if overwritten(node, [n for n in order if order[node] < order[n] <= order[last]]):
            return None
        last.append(node)
    _verify(graph, node, readers)
    graph.lint()
    return fx.GraphModule(loop.module, graph)


def _views(value: fx.Node) -> set[fx.Node]:
    """Values that may share memory with ``value``."""
    found: set[fx.Node] = set()
    stack = [value]
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op != "output" and _compat.may_alias(user):
                found.add(user)
                stack.append(user)
    return found


def overwritten(node: fx.Node, between: Sequence[fx.Node]) -> bool:
    """A node in between writes into memory that ``node`` reads."""
    read = {s for a in node.args[1:] if isinstance(a, fx.Node) for s in sources(a)}
    return any(_writes(n) and not read.isdisjoint(sources(n.args[0])) for n in between)


def _writes(node: fx.Node) -> bool:
    if isinstance(node.target, _compat.OpOverload):
        return node.target._schema.is_mutable
    return node.target in _WRITERS


def sources(value: fx.Node) -> set[fx.Node]:
    """``value`` and the values whose memory it may share."""
    found, stack = {value}, [value]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and _compat.may_alias(node):
            first = isinstance(node.target, _compat.OpOverload) or node.target in _FIRST
            fresh = {n for n in (node.all_input_nodes[:1] if first else node.all_input_nodes)}
            stack += fresh - found
            found |= fresh
    return {n for n in found if not _is_int(n)}


def _is_int(node: fx.Node) -> bool:
    """A size or a bound of the chunk."""
    if node.op == "placeholder":
        return "int" in node.meta
    return node.target in (operator.add, operator.mul, operator.sub, operator.floordiv)


def _verify(graph: fx.Graph, node: fx.Node, readers: set[fx.Node]) -> None:
    order = {n: i for i, n in enumerate(graph.nodes)}
    late = [r.name for r in readers if order[r] > order[node]]
    if late:
        raise VerificationError(f"an update comes before readers of its weight: {late}")


__all__ = ["Sink", "Updating", "overwritten", "sources", "update_in_backward"]
