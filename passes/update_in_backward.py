"""Updates inside a backward program: each weight changes as soon as nothing reads it any more.

A program that runs in one chunk forms every weight gradient in one product. This pass takes the
accumulator of such a gradient out of the program and puts an update in its place, after the last
node of the body that reads the weight or a view of it. So one gradient is alive at a time, and for
plain SGD none: the product is added to the weight (as LOMO does, Lv et al. 2023, but at the old
weights throughout). An in-place write has no data edge to the readers of what it overwrites, so
the order of all updates and readers is checked on the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from torch import Tensor, fx

from fxmem.program.body_op import BODY_OPS, body_op, nothing
from fxmem.program.steps import Free, Loop, Program, Straight
from fxmem.rewriting.aliases import memory_read, readers, views, written_between
from fxmem.rewriting.pipeline import copy_graph
from fxmem.rewriting.straight import VIEWS, results, tensors, without


class Sink(Protocol):
    """Takes the gradient of one weight instead of an accumulator.

    ``product``: it is ``a @ b``; ``value``: it is given; ``total``: ``add(acc, *args)`` adds it to
    ``acc``.
    """

    def product(self, a: Tensor, b: Tensor) -> None: ...
    def value(self, grad: Tensor) -> None: ...
    def total(self, add: Callable[..., None], *args: Any) -> None: ...


@cache
def update_form(fn: Callable[..., None]) -> Callable[..., None]:
    """What takes the place of ``fn(acc, *args)`` with a sink in place of ``acc``."""
    gradient = BODY_OPS[fn].gradient

    def update(sink: Sink, *args: Any) -> None:
        if gradient == "total":
            sink.total(fn, *args)
        else:
            getattr(sink, gradient)(*args)

    update.__name__ = update.__qualname__ = f"update_{fn.__name__}"
    return body_op(writes=(0,), fake=nothing)(update)


@dataclass(slots=True)
class _Path:
    """From an accumulator to the gradient that the program returns: views in straight code."""

    accumulator: str
    names: set[str]
    flipped: bool
    straight: int | None = None
    reshaped: bool = False


@dataclass(frozen=True, slots=True)
class UpdateInBackward:
    """Consume the gradient of the input at ``position`` inside a program where that can be.

    The program takes one more input, the sink. A gradient that several loops add up stays an
    output, and so does that of a weight which a later step reads.
    """

    position: int
    name: str = "update_in_backward"

    def run(self, program: Program) -> Program:
        name = program.outputs[self.position]
        path = _path(program, name) if name is not None else None
        if path is None or program.outputs.count(name) > 1:
            return program
        where = _loop_of(program, path, _aliases(program, program.inputs[self.position]))
        if where is None:
            return program
        new = _consumed(program, self.position, path, where)
        loop = new.steps[where]
        assert isinstance(loop, Loop)
        module = _rewritten(new, loop, path)
        if module is None:
            return program
        new.steps[where] = replace(loop, module=module)
        return new


def _consumed(program: Program, position: int, path: _Path, where: int) -> Program:
    """The program with a sink in place of the accumulator, the loop's body as it was."""
    steps = list(program.steps)
    for i, step in enumerate(steps):
        if isinstance(step, Loop) and i == where:
            allocate = [b for b in step.allocate if b.name != path.accumulator]
            steps[i] = replace(step, allocate=allocate)
        elif isinstance(step, Straight) and i == path.straight:
            steps[i] = without(step, path.names)
        elif isinstance(step, Free):
            steps[i] = Free([n for n in step.names if n not in path.names])
    return replace(
        program, inputs=[*program.inputs, path.accumulator], steps=steps,
        outputs=[None if i == position else o for i, o in enumerate(program.outputs)],
        updates=[*program.updates, (position, path.flipped)],
    )  # fmt: skip


def _path(program: Program, name: str) -> _Path | None:
    """How the output ``name`` comes from one accumulator, or None where it does not."""
    for at, step in enumerate(program.steps):
        if isinstance(step, Loop) and any(b.name == name and b.zero for b in step.allocate):
            return _Path(name, {name}, False)
        if isinstance(step, Straight) and name in step.results:
            return _through(step, at, name)
    return None


def _through(step: Straight, at: int, name: str) -> _Path | None:
    made, given = results(step), tensors(step.module.graph, step.tensors)
    node, flips, chain = made[step.results.index(name)], 0, set()
    while isinstance(node, fx.Node) and str(node.target) in VIEWS:
        if flips % 2 and str(node.target) != "aten.t.default":
            return None
        flips += str(node.target) == "aten.t.default"
        chain.add(node)
        node = node.args[0]
    sources = [n for n, p in given.items() if p is node]
    if not sources:
        return None
    chain.add(node)
    reshaped = any(str(n.target) in VIEWS - {"aten.t.default"} for n in chain)
    names = {r for r, n in zip(step.results, made, strict=True) if n in chain}
    inner = {u for n in chain for u in n.users if u.op != "output"}
    if not inner <= chain:
        return None
    return _Path(sources[0], names | set(sources), bool(flips % 2), at, reshaped)


def _aliases(program: Program, weight: str) -> set[str]:
    """Names of the weight and of views of it that straight code makes."""
    found = {weight}
    for step in program.steps:
        if isinstance(step, Straight):
            given = [p for n, p in tensors(step.module.graph, step.tensors).items() if n in found]
            same = {v for p in given for v in (p, *views(p))}
            made = zip(step.results, results(step), strict=True)
            found |= {r for r, n in made if n in same}
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


def _rewritten(program: Program, loop: Loop, path: _Path) -> fx.GraphModule | None:
    """The body with an update in place of the accumulation, or None where it has another form."""
    module = copy_graph(loop.module)
    given = tensors(module.graph, loop.tensors)
    acc = given[path.accumulator]
    (node, *others) = acc.users
    known = BODY_OPS.get(node.target)
    if others or known is None or not known.gradient or node.args[0] is not acc:
        return None
    if path.reshaped and known.gradient == "total":
        return None
    updates = _updates(program, given)
    last = max({*updates[node], node})
    if node in updates[node]:
        return None
    if last is not node:
        if not memory_read(node.args[1:]).isdisjoint(written_between(node, last.next)):
            return None
        last.append(node)
    if any(update < reader for update, reading in updates.items() for reader in reading):
        return None
    node.target = update_form(known.fn)
    module.graph.lint()
    module.recompile()
    return module


def _updates(program: Program, given: dict[str, fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The updates of a body, and what reads the weight of each: that must come before."""
    sinks = program.inputs[len(program.inputs) - len(program.updates) :]
    found = {}
    for sink, (position, _) in zip(sinks, program.updates, strict=True):
        if sink in given:
            (node,) = given[sink].users
            weights = _aliases(program, program.inputs[position]) & given.keys()
            found[node] = {r for w in weights for r in readers(given[w]) if r.op != "output"}
    return found
