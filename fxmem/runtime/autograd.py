"""Running programs: the loops, and one autograd function per region.

The autograd function's inputs are the region's tensors and its parameters, so every gradient is
returned exactly once per backward and hooks, gradient accumulation, DDP and ``GradScaler`` behave
as always. The forward saves the region's inputs only. A region that ends in a scalar loss takes its
gradients in the forward, with tangent 1, and scales them later: the LM head is never computed
twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxmem.errors import BackwardTwiceError, DoubleBackwardError, ModifiedParameterError
from fxmem.runtime.loops import CallState
from fxmem.runtime.offload import Leaving
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.sharding import RegionShards
from fxmem.runtime.shared_grads import Shared


class RegionFunction(torch.autograd.Function):
    """``apply(code, state, chunk, seed, shared, sole, level, away, shards, *tensors)``: outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        code: RegionCode,
        state: CallState,
        chunk: int,
        seed: Tensor | None,
        shared: Shared,
        sole: Sequence[bool],
        level: int,
        away: Sequence[bool],
        shards: RegionShards | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        grads, held = None, []  # type: list[Tensor | None] | None, list[Tensor]
        variant = code.variant(ctx.needs_input_grad[-len(tensors) :])
        if level and not variant:
            variant = f"+{level}"
            outputs, held = code.forward_held(state, chunk, tensors, seed, level)
        else:
            outputs, grads = code.forward(state, chunk, tensors, seed, learn=True, variant=variant)
        kept = code.saved(grads is not None, variant)
        saved = [t if k else None for t, k in zip(tensors, kept, strict=True)]
        movable = [*away, *(True for _ in held)] if away else []
        save(ctx, [*saved, *held], movable, state.leaving)
        ctx.count, ctx.variant = len(saved), variant
        state.watch(saved)
        ctx.code, ctx.state, ctx.chunk, ctx.seed, ctx.grads = code, state, chunk, seed, grads
        ctx.shared, ctx.shards = shared, shards
        state.shared.own(shared, ctx)
        ctx.sole = [s for s, d in zip(sole, code.differentiable, strict=True) if d]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, d in zip(outputs, code.differentiable, strict=True) if not d)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError("backward with create_graph=True through a streamed region")
        if ctx.shards is None:
            out = _gradients(ctx, tangents)
        else:
            with ctx.shards.backward():
                out = _gradients(ctx, tangents)
                ctx.shards.take(out)
        return (*(None,) * 9, *out)


def _gradients(ctx: Any, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of the region's tensors; those of shared parameters go to their owner."""
    state, code = ctx.state, ctx.code
    saved = _saved(ctx, state)
    grads, ctx.grads = ctx.grads, None
    given = [t for t, d in zip(tangents, code.differentiable, strict=True) if d]
    free = [t is not None and f and _storage(t) in state.fresh
            for t, f in zip(given, ctx.sole, strict=True)]  # fmt: skip
    loss = given[code.loss] if sum(t is not None for t in given) == 1 else None
    if grads is not None and loss is not None:
        out = joined(code.scale(grads, loss), state.shared.take(ctx.shared))
    else:
        out = _backward(ctx, saved, given, free)
    taken = [t for t, f in zip(given, free, strict=True) if not f]
    _tell_fresh(state, code, out, [*saved, *taken])
    state.shared.hand_on(ctx.shared, out)
    return out


def _backward(
    ctx: Any, saved: Sequence[Any], given: Sequence[Tensor | None], free: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients for these tangents; None for inputs that depend on none of them."""
    whole: RegionCode = ctx.code
    owned = ctx.state.shared.take(ctx.shared)
    there = [t is not None for t in given]
    if not any(there):
        return joined([None] * ctx.count, owned)
    code = whole.given(there)
    held = saved[ctx.count :] if code is whole else ()
    variant = ctx.variant if held else code.variant(ctx.needs_input_grad[-ctx.count :])
    return code.backward(
        ctx.state, ctx.chunk, saved[: ctx.count], ctx.seed, [t for t in given if t is not None],
        owned, variant,
        free=[f for f, t in zip(free, there, strict=True) if t], held=held,
    )  # fmt: skip


def joined(grads: list[Tensor | None], more: Mapping[int, Tensor]) -> list[Tensor | None]:
    for i, part in more.items():
        own = grads[i]
        grads[i] = part if own is None else part.add_(own)
    return grads


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tell_fresh(
    state: CallState, code: RegionCode, grads: list[Tensor | None],
    others: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Tell the next backward which gradients of other regions' values have a storage of their own,
    and give those of parameters one: what autograd adds to must be nothing else's memory."""
    held = {_storage(t) for t in others if t is not None}
    counts = Counter(_storage(g) for g in grads if g is not None)
    for i, parameter in enumerate(code.region.parameter_mask):
        grad = grads[i]
        if grad is None:
            continue
        storage = _storage(grad)
        if parameter and counts[storage] > 1:
            counts[storage] -= 1
            grads[i] = grad.clone()
        elif not parameter and counts[storage] == 1 and storage not in held:
            state.fresh.add(storage)
        else:
            state.fresh.discard(storage)


def save(
    ctx: Any, tensors: Sequence[Tensor | None], movable: Sequence[bool], leaving: Leaving | None
) -> None:
    """Keep tensors for the backward, on their device or away from it; ``movable``: of the first."""
    ctx.away, gone = None, frozenset[int]()
    if leaving is not None and movable:
        given = [t if m else None for t, m in zip(tensors, movable, strict=False)]
        ctx.away, gone = leaving.save(given)
    ctx.save_for_backward(*(None if i in gone else t for i, t in enumerate(tensors)))


def _saved(ctx: Any, state: CallState) -> Sequence[Any]:
    """The saved tensors, unchanged since the forward."""
    try:
        saved: Sequence[Any] = ctx.saved_tensors
        state.begin_backward()
        if ctx.away is not None:
            back = ctx.away.get()
            saved = [back.get(i, t) for i, t in enumerate(saved)]
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            state.begin_backward()
            raise ModifiedParameterError(
                "a parameter or input was changed in place between forward and backward"
            ) from error
        raise BackwardTwiceError("backward through the same forward a second time") from error
    return saved


def run_region(
    code: RegionCode,
    state: CallState,
    chunk: int,
    tensors: Sequence[Tensor],
    shared: Shared | None = None,
    sole: Sequence[bool] | None = None,
    level: int = 0,
    away: Sequence[bool] = (),
    shards: RegionShards | None = None,
) -> Sequence[Tensor]:
    """Outputs of a region, with autograd where any input wants a gradient.

    ``sole``: which outputs have one reader, another region, so that their gradient comes as that
    region made it. ``level``: of what it keeps for the backward. ``away``: which
    tensors wait for it off the device, and with them what is kept besides; empty for none.
    """
    seed = code.draw_seed(tensors[0].device)
    if torch.is_grad_enabled() and code.learns and any(t.requires_grad for t in tensors):
        sole = sole or [False] * len(code.differentiable)
        shared = shared or {}
        return RegionFunction.apply(
            code, state, chunk, seed, shared, sole, level, away, shards, *tensors
        )
    with torch.no_grad():
        return code.forward(state, chunk, tensors, seed, learn=False)[0]
