"""Updates inside a backward program: each weight changes as soon as nothing reads it any more.

A program that runs in one chunk forms every weight gradient in one product. This pass takes the
accumulator of such a gradient out of the program and puts an update in its place, after the last
node of the body that reads the weight or a view of it. So one gradient is alive at a time, and for
plain SGD none: the product is added to the weight (as LOMO does, Lv et al. 2023, but at the old
weights throughout). An in-place write has no data edge to the readers of what it overwrites, so
their order is checked once more on the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, fx

from fxmem import _compat, runtime
from fxmem.errors import VerificationError
from fxmem.program import Loop, Program, Straight


class Sink(Protocol):
    """Takes the gradient of one weight instead of an accumulator."""

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
    runtime.add_bmm: update_bmm,
    runtime.add_embedding: update_embedding,
    runtime.add_expert_weight: update_expert_weight,
}


@dataclass(slots=True)
class Updating:
    """``program`` takes one more input per entry of ``positions``: the sink of that gradient."""

    program: Program
    positions: list[int]


def update_in_backward(program: Program, positions: Sequence[int]) -> Updating:
    """Consume the gradients at ``positions`` inside ``program`` where that can be.

    The rest stay outputs: gradients that several loops or straight code make, and of weights that a
    later step reads. The given program is left as it is.
    """
    steps, outputs, inputs, done = list(program.steps), list(program.outputs), [], []
    for position in positions:
        name, weight = outputs[position], program.inputs[position]
        where = _single_loop(steps, name, weight)
        if name is None or where is None or outputs.count(name) > 1:
            continue
        loop = steps[where]
        assert isinstance(loop, Loop)
        module = _rewritten(loop, name, weight)
        if module is None:
            continue
        allocate = [b for b in loop.allocate if b.name != name]
        steps[where] = replace(loop, module=module, allocate=allocate)
        outputs[position] = None
        inputs.append(name)
        done.append(position)
    changed = replace(
        program, name=f"{program.name}_update", inputs=[*program.inputs, *inputs], steps=steps,
        outputs=outputs,
    )  # fmt: skip
    return Updating(changed, done)


def _single_loop(steps: Sequence[Any], name: str | None, weight: str) -> int | None:
    """The step that alone makes ``name``, if no later step reads the weight or the gradient."""
    found: int | None = None
    for i, step in enumerate(steps):
        if not isinstance(step, (Loop, Straight)):
            continue
        if found is not None and (weight in step.tensors or name in step.tensors):
            return None
        if isinstance(step, Loop) and any(b.name == name and b.zero for b in step.allocate):
            found = i
    return found


def _rewritten(loop: Loop, name: str, weight: str) -> fx.GraphModule | None:
    """The body with an update in place of the accumulation, or None where it has another form."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(loop.module.graph, {}))
    given = list(graph.find_nodes(op="placeholder"))
    tensors = dict(zip(loop.tensors, given[len(given) - len(loop.tensors) :], strict=True))
    users = list(tensors[name].users)
    if len(users) != 1 or users[0].target not in _FORMS or users[0].args[0] is not tensors[name]:
        return None
    (node,) = users
    node.target = _FORMS[node.target]
    order = {n: i for i, n in enumerate(graph.nodes)}
    readers = _readers(tensors[weight]) if weight in tensors else set()
    if node in readers:
        return None
    last = max([*readers, node], key=order.__getitem__)
    if last is not node:
        last.append(node)
    _verify(graph, node, readers)
    graph.lint()
    return fx.GraphModule(loop.module, graph)


def _readers(weight: fx.Node) -> set[fx.Node]:
    """Nodes that read a weight, through views of it too."""
    found: set[fx.Node] = set()
    stack = [weight]
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op != "output":
                found.add(user)
                if _may_alias(user):
                    stack.append(user)
    return found


def _may_alias(node: fx.Node) -> bool:
    """The result may be a view of an operand; functions without a schema are taken to be."""
    if isinstance(node.target, _compat.OpOverload):
        return any(r.alias_info is not None for r in node.target._schema.returns)
    return True


def _verify(graph: fx.Graph, node: fx.Node, readers: set[fx.Node]) -> None:
    order = {n: i for i, n in enumerate(graph.nodes)}
    late = [r.name for r in readers if order[r] > order[node]]
    if late:
        raise VerificationError(f"an update comes before readers of its weight: {late}")


__all__ = ["Sink", "Updating", "update_in_backward"]
