"""One joint forward and backward ATen graph per distinct region.

The trace runs over fake tensors with symbolic sizes, so it costs no memory and holds for every
length. Inputs are ints, tensors, the dropout seed and one tangent per differentiable output;
outputs are the region's outputs and one gradient per input that wants one. Meaning comes from
:class:`Joint`'s lists, never from names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from fxmem import _compat
from fxmem.axes import TensorInfo
from fxmem.capture import canonical_shape, value_of
from fxmem.regions import Region


class Caller(Protocol):
    """Calls one node in canonical form; see :class:`fxmem.passes.canonicalize.Canonicalize`."""

    seed: torch.Tensor | None
    sites: int

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> Any: ...


@dataclass(slots=True)
class Joint:
    """A traced region. ``info`` has the canonical shapes of every tensor node (a tuple for
    multi-outputs).

    ``learned``: nodes that depend on a parameter, on another region or on a tangent. Those that
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


def trace(region: Region, call: Caller, *, backward: bool, only: int | None = None) -> Joint:
    """Trace ``region``; without ``backward`` (or where no input wants a gradient) only its forward.

    ``only``: differentiate this output alone.
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
        bool(backward and any(wants) and v.requires_grad) and only in (None, i)
        for i, v in enumerate(fakes)
    ]

    def joint(*flat: Any) -> list[Any]:
        k, m = len(ints), len(tensors)
        call.seed, call.sites = flat[k + m], 0
        with torch.enable_grad():
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
        gm = _compat.make_fx(joint)(*ints, *tensors, seed, *tangents)
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
    gm = _functional(gm, region)
    gm.graph.eliminate_dead_code()
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    (output,) = gm.graph.find_nodes(op="output")
    results = list(output.args[0])
    k, m = len(region.ints), len(region.values)
    tangents = iter(placeholders[k + m + 1 :])
    grads = iter(results[len(region.outputs) :])
    info: dict[fx.Node, Any] = {}
    for n in gm.graph.nodes:
        info[n] = _info(n.meta.get("val"), region.capture.symbols)
    return Joint(
        gm.graph, gm, placeholders[:k], placeholders[k : k + m], placeholders[k + m],
        [next(tangents) if d else None for d in diff], results[: len(region.outputs)],
        [next(grads) if w else None for w in wants], info, region.capture.symbols, random,
        _learned(gm.graph, placeholders, region),
    )  # fmt: skip


def _learned(graph: fx.Graph, placeholders: list[fx.Node], region: Region) -> set[fx.Node]:
    k, m = len(region.ints), len(region.values)
    sources = zip(placeholders[k : k + m], region.leaves, region.parameter_mask, strict=True)
    found = {n for n, leaf, parameter in sources if parameter or leaf[0] == "main"}
    found.update(placeholders[k + m + 1 :])
    for n in graph.nodes:
        if any(a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def _info(value: Any, symbols: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorInfo(canonical_shape(value, symbols), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_info(v, symbols) for v in value)
    return None


def _functional(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """Remove in-place ops on fresh values, if the trace has any."""
    mutable = [
        n for n in gm.graph.nodes
        if isinstance(n.target, _compat.OpOverload) and n.target._schema.is_mutable
    ]  # fmt: skip
    if not mutable:
        return gm
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    with region.capture.fake_mode:
        return _compat.make_fx(torch.func.functionalize(gm, remove="mutations"))(*values)
