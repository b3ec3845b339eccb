"""The parameter-free part of a capture, lowered to ATen: narrow values, and cones of wide ones.

A *cone* is the graph that computes one wide value (a ``T x T`` mask, say) from narrow leaves. The
preamble program computes the leaves; the cone is traced into the regions that use the value, where
it is cut like everything else, so that the wide value never stands whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat import tracing, wrapped
from fxmem.errors import UnsupportedOpError
from fxmem.frontend.capture import (
    Capture,
    behind,
    canonical,
    canonical_shape,
    is_tensor,
    is_wide,
    value_of,
)
from fxmem.frontend.hidden_writes import without_writes
from fxmem.frontend.interpret import attribute, call_node, run
from fxmem.frontend.origin import module_path, source_line
from fxmem.rules import WRITTEN_OUT

Leaf = tuple[str, str]
"""Name of a run-time value: ``("input", placeholder)``, ``("pre", preamble node)`` or ``("main",
node)``; ``("held", placeholder)`` is an input that the call changes, itself.
"""


Drawing = Callable[[Callable[[Sequence[Sequence[Any]]], bool]], AbstractContextManager[Any]]


@dataclass(slots=True)
class Cone:
    """``module(*ints, *leaves)`` computes one wide value; ``ints`` are capture inputs."""

    module: fx.GraphModule
    ints: list[fx.Node]
    leaves: list[Leaf]
    values: list[torch.Tensor]

    @property
    def key(self) -> str:
        return self.module.code

    def __call__(self, *values: Any) -> Any:
        return _compat_hooks.function(self.module)(*values)


@dataclass(slots=True)
class Parts:
    """A tensor that is made of others, as a quantised weight is, from these: the trace of a region
    goes through to them, and so they are what it takes. A :class:`Cone` of no operators.
    """

    like: torch.Tensor
    leaves: list[Leaf]
    values: list[torch.Tensor]
    ints: list[fx.Node] = field(default_factory=list)

    @property
    def key(self) -> str:
        return wrapped.described(self.like)

    def __call__(self, *values: Any) -> Any:
        return wrapped.together(self.like, values)


@dataclass(slots=True)
class Preamble:
    """``module(*inputs)`` returns the values named in ``outputs``."""

    module: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[str]
    narrow: dict[fx.Node, Leaf] = field(default_factory=dict)
    cones: dict[fx.Node, Cone | Parts] = field(default_factory=dict)
    values: dict[Leaf, torch.Tensor] = field(default_factory=dict)


def leaf_of(pre: Preamble, node: fx.Node) -> Leaf:
    """Where the value of a node is at run time."""
    if node in pre.narrow:
        return pre.narrow[node]
    return ("input" if node.op == "placeholder" else "main", node.name)


@_compat.no_autocast()
def lower(capture: Capture, drawing: Drawing) -> Preamble:
    """Trace every preamble value that main nodes or outputs use.

    ``drawing(wanted)``: within it, the random ops with operands of such shapes are stateless. What
    is narrow is drawn once, as it stands; what is wide is drawn again for every chunk.
    """
    main = set(capture.main)
    users: list[fx.Node] = [b for n in capture.main for a in n.all_input_nodes for b in behind(a)]
    users += [o for o in capture.outputs if isinstance(o, fx.Node)]
    wanted = [
        n for n in dict.fromkeys(users)
        if n not in main and n not in capture.parameters and n.op != "placeholder" and is_tensor(n)
    ]  # fmt: skip
    inputs = [
        n
        for n in capture.inputs
        if n not in capture.parameters and not _compat_hooks.is_hook_state(n)
    ]
    nodes = [n for n in capture.nodes if n not in main and n.op != "placeholder"]
    traced = _trace(capture, inputs, nodes, wanted, drawing)
    pre = _split(capture, traced, inputs, wanted)
    pre.cones |= {n: _parts(n) for n in capture.inputs if wrapped.is_wrapped(value_of(n))}
    return pre


def _parts(node: fx.Node) -> Parts:
    """
    Raises:
        UnsupportedOpError: it learns, and its gradient would be one of its parts'.
    """
    value = value_of(node)
    if value.requires_grad:
        user = next(iter(node.users), node)
        raise UnsupportedOpError(
            f"a parameter of class {type(value).__name__} that learns", op=str(user.target),
            module=module_path(user), source=source_line(user),
            advice="freeze it (requires_grad_(False)) and train adapters beside it",
        )  # fmt: skip
    inner = wrapped.parts(value)
    return Parts(value, [("input", f"{node.name}.{i}") for i in range(len(inner))], inner)


def _trace(
    capture: Capture, inputs: list[fx.Node], nodes: list[fx.Node], wanted: list[fx.Node],
    drawing: Drawing,
) -> fx.GraphModule:  # fmt: skip
    axes = capture.lengths

    def wide(shapes: Sequence[Sequence[Any]]) -> bool:
        given = [[canonical(s, capture.symbols) for s in shape] for shape in shapes]
        return any(is_wide(shape, axes) for shape in given)

    def fn(*values: Any) -> list[Any]:
        env: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
        with drawing(wide):
            run(nodes, env, capture, call_node)
        # a fresh name for each, so that an input that is passed on does not end the trace as itself
        return [env[n] for n in wanted]

    with capture.fake_mode, torch.no_grad():
        traced = tracing.traced(fn, *(value_of(n) for n in inputs), written_out=WRITTEN_OUT)
        return without_writes(traced, contextlib.nullcontext())


def _split(
    capture: Capture, gm: fx.GraphModule, inputs: list[fx.Node], wanted: list[fx.Node]
) -> Preamble:
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    origin = dict(zip(placeholders, inputs, strict=True))
    (output,) = gm.graph.find_nodes(op="output")
    results = output.args[0]
    pre = Preamble(gm, inputs, [])
    keep: dict[fx.Node, Leaf] = {}
    axes = capture.lengths

    def name(node: fx.Node) -> Leaf:
        if node in origin:
            leaf = ("input", origin[node].name)
        else:
            leaf = ("pre", node.name)
            keep[node] = leaf
        pre.values[leaf] = value_of(node)
        return leaf

    for source, node in zip(wanted, results, strict=True):
        wide = is_wide(canonical_shape(value_of(node), capture.symbols), axes)
        whole = node in origin or source in capture.outputs or _compat.is_random(node.target)
        if wide and not whole:
            pre.cones[source] = _cone(capture, gm, node, origin, name)
        else:
            pre.narrow[source] = name(node)
    output.args = (list(keep),)
    pre.outputs = [leaf[1] for leaf in keep.values()]
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return pre


def _cone(
    capture: Capture, gm: fx.GraphModule, root: fx.Node, origin: dict[fx.Node, fx.Node], name: Any
) -> Cone:
    order: list[fx.Node] = []
    leaves: dict[fx.Node, None] = {}
    axes = capture.lengths

    def visit(node: fx.Node) -> None:
        if node in order or node in leaves:
            return
        value = value_of(node)
        narrow = isinstance(value, torch.Tensor) and not is_wide(
            canonical_shape(value, capture.symbols), axes
        )
        drawn = _compat.is_random(node.target)  # once: a second draw gives other numbers
        kept = drawn or (narrow and node is not root and not _is_constant(node))
        if node.op == "placeholder" or kept:
            leaves[node] = None
            return
        for a in node.all_input_nodes:
            visit(a)
        order.append(node)

    visit(root)
    ints = [n for n in leaves if not isinstance(value_of(n), torch.Tensor)]
    tensors = [n for n in leaves if isinstance(value_of(n), torch.Tensor)]
    graph = fx.Graph()
    env = {n: graph.placeholder(f"a{i}") for i, n in enumerate([*ints, *tensors])}
    module = torch.nn.Module()
    for n in order:
        if n.op == "get_attr":
            setattr(module, n.target, attribute(gm, n.target))
        env[n] = graph.node_copy(n, lambda a: env[a])
    graph.output(env[root])
    return Cone(
        fx.GraphModule(module, graph),
        [origin[n] for n in ints],
        [name(n) for n in tensors],
        [value_of(n) for n in tensors],
    )


def _is_constant(node: fx.Node) -> bool:
    """A factory call: cheaper to repeat in a region than to pass in."""
    return node.op == "call_function" and not any(
        isinstance(value_of(a), torch.Tensor) for a in node.all_input_nodes
    )


@_compat.no_autocast()
def execute(pre: Preamble, values: Sequence[Any]) -> dict[Leaf, Any]:
    """Run the preamble on the values of its inputs."""
    with torch.no_grad():
        results = _compat_hooks.function(pre.module)(*values)
    return {("pre", n): v for n, v in zip(pre.outputs, results, strict=True)}
