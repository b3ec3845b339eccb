"""One joint forward and backward ATen graph per distinct region.

The trace runs over fake tensors with symbolic sizes, so it costs no memory and holds for every
length. Inputs are ints, tensors, the dropout seed and one tangent per differentiable output;
outputs are the region's outputs and one gradient per input that wants one. Meaning comes from
:class:`Joint`'s lists, never from names.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from fxmem._compat import tracing
from fxmem._compat.data_sizes import by_data
from fxmem.axes.signature import TensorInfo
from fxmem.errors import CaptureError
from fxmem.frontend.capture import canonical_shape, value_of
from fxmem.frontend.hidden_writes import without_writes
from fxmem.frontend.interpret import fake_call
from fxmem.frontend.origin import module_path, source_line
from fxmem.frontend.regions import Region
from fxmem.rules import WRITTEN_OUT


class Caller(Protocol):
    """Calls one node in canonical form; see :class:`fxmem.frontend.canonicalize.Canonicalize`."""

    seed: torch.Tensor | None
    sites: int

    def drawing(self) -> AbstractContextManager[Any]:
        """Random ops called meanwhile become functions of the seed and a site of their own."""

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> Any: ...


@dataclass(slots=True)
class Joint:
    """A traced region. ``info`` has the canonical shapes of every tensor node (a tuple for
    multi-outputs).

    ``learned``: nodes that depend on a parameter, on another region, on a tangent or on the seed.
    Those that
    carry the streamed axis are cut however small they are; other small values may stand whole.
    """

    graph: fx.Graph
    module: fx.GraphModule
    ints: list[fx.Node]
    inputs: list[fx.Node]
    seed: fx.Node
    tangents: list[fx.Node | None]
    outputs: list[fx.Node | None]
    grads: list[fx.Node | None]
    info: dict[fx.Node, Any]
    symbols: dict[Any, Any]
    random: bool
    learned: set[fx.Node]

    def copy(self) -> Joint:
        """The same region on a graph of its own, for a pass to edit."""
        graph, at = fx.Graph(), {}  # type: fx.Graph, dict[fx.Node, fx.Node]
        graph.output(graph.graph_copy(self.graph, at))
        module = fx.GraphModule(self.module, graph)

        def own(nodes: Sequence[fx.Node | None]) -> list[fx.Node | None]:
            return [None if n is None else at[n] for n in nodes]

        return Joint(
            module.graph, module, [at[n] for n in self.ints], [at[n] for n in self.inputs],
            at[self.seed], own(self.tangents), own(self.outputs), own(self.grads),
            {at[n]: i for n, i in self.info.items() if n in at}, self.symbols, self.random,
            {at[n] for n in self.learned if n in at},
        )  # fmt: skip

    def call(
        self, at: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None, *, like: fx.Node
    ) -> fx.Node:
        """A call before ``at``, with shape and dtype of ``like``."""
        with self.graph.inserting_before(at):
            new = self.graph.call_function(target, args, kwargs)
        new.meta.update(like.meta)
        for key in ("stack_trace", "nn_module_stack"):
            if key in at.meta:
                new.meta[key] = at.meta[key]
        self.info[new] = self.info[like]
        if any(a in self.learned for a in new.all_input_nodes):
            self.learned.add(new)
        return new

    def first_of(self, at: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """The first result of a call before ``at`` that has several."""
        with self.graph.inserting_before(at):
            call = self.graph.call_function(target, args)
            first = self.graph.call_function(operator.getitem, (call, 0))
        call.meta.update({k: v for k, v in at.meta.items() if k != "val"})
        call.meta["val"] = fake_call(call, False)
        self.info[call] = info_of(call.meta["val"], self.symbols)
        first.meta["val"], self.info[first] = call.meta["val"][0], self.info[call][0]
        if any(a in self.learned for a in call.all_input_nodes):
            self.learned |= {call, first}
        return first

    def number(self, at: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        """A call before ``at`` that gives a size."""
        with self.graph.inserting_before(at):
            new = self.graph.call_function(target, args)
        new.meta["val"], self.info[new] = value, None
        return new

    def forget_erased(self) -> None:
        """Nothing is known any more of nodes that passes have taken away."""
        there = set(self.graph.nodes)
        self.info = {n: i for n, i in self.info.items() if n in there}
        self.learned &= there

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let everything that takes ``node`` take ``new``; nobody needs ``node`` any more."""
        node.replace_all_uses_with(new)
        self.outputs = [new if o is node else o for o in self.outputs]
        self.grads = [new if g is node else g for g in self.grads]


def trace(
    region: Region, call: Caller, *, backward: bool, only: Collection[int] | None = None
) -> Joint:
    """Trace ``region``; without ``backward`` (or where no input wants a gradient) only its forward.

    ``only``: differentiate these outputs alone.
    """
    mode = region.capture.fake_mode
    wants = region.needs_grad if backward else [False] * len(region.values)
    with mode, torch.enable_grad():
        tensors = [_fresh(v, w) for v, w in zip(region.values, wants, strict=True)]
        seed = torch.zeros((), dtype=torch.int64)
    ints = [value_of(n) for n in region.ints]
    record: dict[str, Any] = {}
    forward = region.function(call)
    fakes = _output_values(region)
    diff = [
        bool(backward and any(wants) and v.requires_grad) and (only is None or i in only)
        for i, v in enumerate(fakes)
    ]

    def joint(*flat: Any) -> list[Any]:
        k, m = len(ints), len(tensors)
        call.seed, call.sites = flat[k + m], 0
        with torch.enable_grad(), call.drawing():
            outs = forward(*flat[: k + m])
            targets = [o for o, d in zip(outs, diff, strict=True) if d and o.requires_grad]
            given = [
                t
                for t, o, d in zip(
                    flat[k + m + 1 :], _only(outs, diff), _only(diff, diff), strict=True
                )
                if o.requires_grad
            ]
            wanted = [t for t, w in zip(flat[k : k + m], wants, strict=True) if w]
            grads = (
                torch.autograd.grad(targets, wanted, given, allow_unused=True)
                if targets
                else [None] * len(wanted)
            )
        record["random"] = call.sites > 0
        return [*outs, *grads]

    with mode, torch.enable_grad():
        tangents = [
            torch.empty_strided(v.shape, _contiguous(v.shape), dtype=v.dtype, device=v.device)
            for v in _only(fakes, diff)
        ]
        gm = tracing.traced(joint, *ints, *tensors, seed, *tangents, written_out=WRITTEN_OUT)
    return _read(gm, region, diff, wants, bool(record["random"]))


def _only(values: Sequence[Any], keep: Sequence[bool]) -> list[Any]:
    return [v for v, k in zip(values, keep, strict=True) if k]


def _output_values(region: Region) -> list[torch.Tensor]:
    return [value_of(n) for n in region.outputs]


def _fresh(value: torch.Tensor, wants_grad: bool) -> torch.Tensor:
    """A new leaf like ``value``; must be called under the fake mode."""
    return torch.empty_strided(
        value.shape,
        value.stride(),
        dtype=value.dtype,
        device=value.device,
        requires_grad=wants_grad,
    )


def _contiguous(shape: Sequence[Any]) -> list[Any]:
    out, acc = [], 1
    for s in reversed(shape):
        out.append(acc)
        acc = acc * s
    return out[::-1]


def _read(
    gm: fx.GraphModule, region: Region, diff: list[bool], wants: list[bool], random: bool
) -> Joint:
    gm = without_writes(gm, region.capture.fake_mode)
    gm.graph.eliminate_dead_code()
    _check_sizes(gm.graph, region)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    (output,) = gm.graph.find_nodes(op="output")
    results = list(output.args[0])
    k, m = len(region.ints), len(region.values)
    tangents = iter(placeholders[k + m + 1 :])
    grads = iter(results[len(region.outputs) :])
    info: dict[fx.Node, Any] = {}
    for n in gm.graph.nodes:
        info[n] = info_of(n.meta.get("val"), region.capture.symbols)
    return Joint(
        gm.graph, gm, placeholders[:k], placeholders[k : k + m], placeholders[k + m],
        [next(tangents) if d else None for d in diff], results[: len(region.outputs)],
        [next(grads) if w else None for w in wants], info, region.capture.symbols, random,
        _learned(gm.graph, placeholders, region),
    )  # fmt: skip


def _check_sizes(graph: fx.Graph, region: Region) -> None:
    """No size that something is computed with is the value of a tensor."""
    found = [n for n in graph.nodes if by_data(n.meta.get("val"))]
    if any(isinstance(n.meta["val"], torch.SymInt) for n in found):
        # an earlier region may have made it
        before = [n for n in region.capture.nodes if by_data(value_of(n))]
        made = next((n for n in (*found, *before) if source_line(n)), found[0])
        raise CaptureError(
            "a size depends on the values of a tensor", op=str(made.target),
            module=module_path(made), source=source_line(made),
            advice="keep all rows: torch.where(mask, x, 0) in place of x[mask]",
        )  # fmt: skip


def _learned(graph: fx.Graph, placeholders: list[fx.Node], region: Region) -> set[fx.Node]:
    k, m = len(region.ints), len(region.values)
    sources = zip(placeholders[k : k + m], region.leaves, region.parameter_mask, strict=True)
    found = {n for n, leaf, parameter in sources if parameter or leaf[0] == "main"}
    found.update(placeholders[k + m :])
    for n in graph.nodes:
        if any(a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def info_of(value: Any, symbols: Any) -> Any:
    """Canonical shape and dtype of a tensor, a tuple of them for a tuple, else None."""
    if isinstance(value, torch.Tensor):
        return TensorInfo(canonical_shape(value, symbols), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(info_of(v, symbols) for v in value)
    return None
