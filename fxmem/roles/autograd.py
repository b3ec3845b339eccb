"""The autograd function of a region whose parameters have roles.

As :class:`~fxmem.runtime.autograd.RegionFunction`, with two differences: autograd sees only the
inputs whose gradients are returned, and gradients of UPDATE parameters go to the role table. A
region that runs in one chunk hands them over inside its program, one alive at a time; one that
runs in several needs its weights until its last chunk, so their sums are handed over after it,
one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import graph as _compat
from fxmem.errors import BackwardTwiceError, DoubleBackwardError, ModifiedParameterError
from fxmem.roles.roles import Role, RoleTable
from fxmem.roles.updates import backward as updates_in
from fxmem.roles.variants import Selection
from fxmem.runtime.autograd import _saved, joined, save
from fxmem.runtime.loops import CallState
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.shared_grads import Shared


@dataclass(slots=True)
class Step:
    """What the regions of one call share.

    Attributes:
        table: at its forward; ``generation`` is the table's of that time.
        updates: some region of the call updates weights in its backward.
        read: weights that backwards will read, with their versions at the forward.
        expected: parameters whose gradients the table expects of the call.
        entered: number of the latest backward pass that has entered a region of the call.
    """

    table: RoleTable
    updates: bool
    generation: int
    read: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    expected: list[nn.Parameter] = field(default_factory=list)
    entered: int = -1


@dataclass(slots=True)
class Run:
    """One region of one call; ``movable``: which of its tensors wait off the device."""

    selection: Selection
    step: Step
    state: CallState
    chunk: int
    seed: Tensor | None
    shared: Shared
    movable: Sequence[bool] = ()


class RoleFunction(torch.autograd.Function):
    """``apply(run, anchor, *tensors) -> outputs``; ``anchor`` makes autograd enter the region."""

    @staticmethod
    def forward(ctx: Any, run: Run, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        chosen = run.selection
        code, variant = chosen.code, chosen.variant
        outputs, grads = code.forward(
            run.state, run.chunk, tensors, run.seed, learn=True, variant=variant
        )
        kept = code.saved(grads is not None, variant)
        saved = [t if k else None for t, k in zip(tensors, kept, strict=True)]
        save(ctx, saved, run.movable, run.state.leaving)
        ctx.run, ctx.grads, ctx.variant, ctx.done = run, grads, variant, False
        run.state.shared.own(_returned(run), ctx)
        run.step.read += [
            (p, p._version) for i, p in chosen.parameters.items() if kept[i] or i in chosen.updates
        ]
        for parameter in chosen.updates.values():
            run.step.table.expect(parameter)
        run.step.expected += chosen.updates.values()
        ctx.shapes = [
            (o.shape, o.dtype, o.device)
            for o, d in zip(outputs, code.differentiable, strict=True) if d
        ]  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, d in zip(outputs, code.differentiable, strict=True) if not d)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError("backward with create_graph=True through a streamed region")
        _enter(ctx)
        run: Run = ctx.run
        saved = _saved(ctx, run.state)
        grads, ctx.grads = ctx.grads, None
        code = run.selection.code
        given = [t for t, d in zip(tangents, code.differentiable, strict=True) if d]
        loss = given[code.loss] if sum(t is not None for t in given) == 1 else None
        if grads is not None and loss is not None:
            out = joined(code.scale(grads, loss), run.state.shared.take(_returned(run)))
        else:
            full = [
                torch.zeros(s, dtype=dt, device=dev) if t is None else t
                for t, (s, dt, dev) in zip(given, ctx.shapes, strict=True)
            ]
            out = _backward(run, ctx.variant, saved, full)
            # not the zeros of what depends on no tangent: plain PyTorch has no gradient there
            there = _reached(code, [t is not None for t in given])
            kept = [*run.selection.updates, *_returned(run)]
            out = [
                g if r or i in kept else None
                for i, (g, r) in enumerate(zip(out, there, strict=True))
            ]
        grads = None
        _separate(out, run.selection.updates)
        run.state.shared.hand_on(_returned(run), out)
        del saved
        ctx.done = True
        for i, parameter in reversed(run.selection.updates.items()):
            grad, out[i] = out[i], None
            if grad is not None:
                run.step.table.complete(parameter, grad)
            del grad
        return (None, None, *out)


def _backward(
    run: Run, variant: str, saved: Sequence[Tensor | None], full: Sequence[Tensor]
) -> list[Tensor | None]:
    code, updates = run.selection.code, run.selection.updates
    ties = any(i in run.shared for i, r in run.selection.roles.items() if r is Role.ACTIVE)
    if updates and not ties and run.chunk >= run.state.sizes.get("T", 1):
        given = [*saved, run.seed, *full]
        return updates_in(code, variant, run.state, run.chunk, given, updates, run.step.table)
    return code.backward(
        run.state, run.chunk, saved, run.seed, full, _started(run), variant=variant
    )


def _reached(code: RegionCode, there: Sequence[bool]) -> list[bool]:
    """Which gradients depend on the tangents that are there."""
    known: dict[tuple[bool, ...], list[bool]] = code.derived.setdefault(("reached",), {})
    if (key := tuple(there)) not in known:
        joint = code.joint
        tangents = [t for t in joint.tangents if t is not None]
        after = {t for t, given in zip(tangents, there, strict=True) if given}
        for node in joint.graph.nodes:
            if any(n in after for n in node.all_input_nodes):
                after.add(node)
        known[key] = [g in after for g in joint.grads]
    return known[key]


def _separate(grads: list[Tensor | None], updates: Mapping[int, nn.Parameter]) -> None:
    """Two parameters may have one tensor as gradient; each needs its own to add to."""
    seen = {g.untyped_storage().data_ptr() for i, g in enumerate(grads)
            if g is not None and i not in updates}  # fmt: skip
    for i in updates:
        grad = grads[i]
        if grad is not None:
            if grad.untyped_storage().data_ptr() in seen:
                grads[i] = grad = grad.clone()
            seen.add(grad.untyped_storage().data_ptr())


def _enter(ctx: Any) -> None:
    """Raise, before anything has changed, where weights are not those of the forward any more."""
    step: Step = ctx.run.step
    if ctx.done and step.updates:
        raise BackwardTwiceError(
            "a second backward through a forward whose gradients updated weights",
            advice="run the forward again",
        )
    number = _compat.backward_id()
    if step.entered == number:
        return  # from here on this backward's own updates change weights
    moved = any(p._version != version for p, version in step.read)
    stepped = step.updates and step.table.generation != step.generation
    if moved or stepped:
        if not stepped:  # this forward has no backward any more; others need not wait for it
            step.table.forget(step.expected)
            step.expected = []
        raise ModifiedParameterError(
            "weights changed, or the optimizer stepped, between a forward and its backward"
        )
    step.entered = number
    step.table.begin_backward(number)


def _returned(run: Run) -> Shared:
    """Tied parameters whose gradient autograd gets; those of updates wait in the table."""
    roles = run.selection.roles
    return {i: s for i, s in run.shared.items() if roles.get(i) is Role.ACTIVE}


def _started(run: Run) -> dict[int, Tensor]:
    """Sums that gradients of this region continue, by input position."""
    owned = run.state.shared.take(_returned(run))
    for i, parameter in run.selection.updates.items():
        if (part := run.step.table.started(parameter)) is not None:
            owned[i] = part
    return owned


_ANCHORS: dict[torch.device, Tensor] = {}


def _anchor(device: torch.device) -> Tensor:
    if device not in _ANCHORS:
        _ANCHORS[device] = torch.empty(0, device=device, requires_grad=True)
    return _ANCHORS[device]


def run_selected(run: Run, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Outputs of a region; autograd enters only where the selection learns."""
    chosen = run.selection
    given = [*tensors, *chosen.extra]
    if not (torch.is_grad_enabled() and chosen.learns):
        with torch.no_grad():
            return chosen.code.forward(run.state, run.chunk, given, run.seed, learn=False)[0]
    seen = [
        t if w and i not in chosen.updates else t.detach()
        for i, (t, w) in enumerate(zip(given, chosen.wanted, strict=True))
    ]
    outputs: Sequence[Tensor] = RoleFunction.apply(run, _anchor(given[0].device), *seen)
    return outputs


__all__ = ["RoleFunction", "Run", "Step", "run_selected"]
