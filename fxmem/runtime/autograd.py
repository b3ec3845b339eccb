"""One autograd function per region.

The autograd function's inputs are the region's tensors and its parameters, so every gradient is
returned exactly once per backward and hooks, gradient accumulation, DDP and ``GradScaler`` behave
as always. The forward saves the region's inputs only. A region that ends in a scalar loss takes its
gradients in the forward, with tangent 1, and scales them later: the LM head is never computed
twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmem.errors import BackwardTwiceError, DoubleBackwardError, ModifiedParameterError
from fxmem.runtime.loops import CallState
from fxmem.runtime.offload import Leaving
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.sharding import RegionShards
from fxmem.runtime.shared_grads import Shared


@dataclass(slots=True)
class Run:
    """One region of one call.

    Attributes:
        seed: of its random numbers.
        shared: parameters of several regions whose gradients autograd gets.
        sole: which outputs have one reader, another region, so that their gradient comes as that
            region made it.
        level: of what it keeps for the backward.
        away: which tensors wait for it off the device, and with them what is kept besides; empty
            for none.
        shards: what is done around it where its parameters are sharded.
    """

    code: RegionCode
    state: CallState
    chunk: int
    seed: Tensor | None
    shared: Shared
    sole: Sequence[bool]
    level: int = 0
    away: Sequence[bool] = ()
    shards: RegionShards | None = None

    def variant(self, code: RegionCode, wanted: Sequence[bool]) -> str:
        """Of the programs of ``code``, where autograd wants the gradients of these inputs."""
        return code.variant(wanted)

    def remember(self, saved: Sequence[Tensor | None]) -> None:
        """After the forward: what its backward will read."""
        self.state.watch(saved)

    def enter(self) -> None:
        """Before the backward, which may still raise without having changed anything."""

    def backward(
        self, ctx: Any, saved: Sequence[Any], given: Sequence[Tensor | None], free: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients for these tangents, with what other regions handed on; None for inputs that
        depend on no tangent. ``free``: tangents whose memory a result may take.
        """
        start = self.state.shared.take(self.shared)
        there = [t is not None for t in given]
        if not any(there):
            return _joined([None] * ctx.count, start)
        code = self.code.given(there)
        held = saved[ctx.count :] if code is self.code else ()
        variant = ctx.variant if held else self.variant(code, ctx.needs_input_grad[2:])
        return code.backward(
            self.state, self.chunk, saved[: ctx.count], self.seed,
            [t for t in given if t is not None], start, variant,
            [f for f, t in zip(free, there, strict=True) if t], held,
        )  # fmt: skip

    def hand_in(self, grads: list[Tensor | None], nodes: Sequence[Any]) -> None:
        """Take gradients that autograd does not get out of ``grads``; ``nodes``: what of its graph
        gets the others.
        """
        if self.shards is not None:
            self.shards.take(grads, nodes)


class RegionFunction(torch.autograd.Function):
    """``apply(run, anchor, *tensors) -> outputs``; an ``anchor`` makes autograd enter the region
    where no tensor's gradient is autograd's.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, anchor: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        code, state = run.code, run.state
        grads: list[Tensor | None] | None = None
        held: list[Tensor] = []
        variant = run.variant(code, ctx.needs_input_grad[2:])
        if run.level and not variant:
            variant = f"+{run.level}"
            outputs, held = code.forward_held(state, run.chunk, tensors, run.seed, run.level)
        else:
            outputs, grads = code.forward(
                state, run.chunk, tensors, run.seed, learn=True, variant=variant
            )
        kept = code.saved(grads is not None, variant)
        saved = [t if k else None for t, k in zip(tensors, kept, strict=True)]
        movable = [*run.away, *(True for _ in held)] if run.away else []
        _save(ctx, [*saved, *held], movable, state.leaving)
        run.remember(saved)
        ctx.run, ctx.variant, ctx.grads, ctx.count = run, variant, grads, len(saved)
        state.shared.own(run.shared, ctx)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, d in zip(outputs, code.differentiable, strict=True) if not d)
        )
        return tuple(outputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise DoubleBackwardError(
            "forward-mode differentiation of a streamed region",
            advice="use the model without fxmem, or reverse mode",
        )

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError("backward with create_graph=True through a streamed region")
        run: Run = ctx.run
        run.enter()
        with run.shards.backward() if run.shards is not None else nullcontext():
            out = _gradients(ctx, run, tangents)
            run.hand_in(out, [node for node, _ in ctx.next_functions[-ctx.count :]])
        return (None, None, *out)


def _gradients(ctx: Any, run: Run, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of the region's tensors; those of shared parameters go to their owner."""
    state, code = run.state, run.code
    saved = _saved(ctx, state)
    grads, ctx.grads = ctx.grads, None
    pairs = zip(tangents, run.sole, code.differentiable, strict=True)
    given, sole = zip(*((t, s) for t, s, d in pairs if d), strict=True)
    free = [t is not None and f and _storage(t) in state.fresh
            for t, f in zip(given, sole, strict=True)]  # fmt: skip
    loss = given[code.loss] if sum(t is not None for t in given) == 1 else None
    if grads is not None and loss is not None:
        out = _joined(code.scale(grads, loss), state.shared.take(run.shared))
    else:
        out = run.backward(ctx, saved, given, free)
    taken = [t for t, f in zip(given, free, strict=True) if not f]
    _tell_fresh(state, code, out, [*saved, *taken])
    state.shared.hand_on(run.shared, out)
    return out


def _joined(grads: list[Tensor | None], more: Mapping[int, Tensor]) -> list[Tensor | None]:
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


def _save(
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
        state.versions.check()
        if ctx.away is not None:
            back = ctx.away.get()
            saved = [back.get(i, t) for i, t in enumerate(saved)]
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            state.versions.check()
            raise ModifiedParameterError(
                "a parameter or input was changed in place between forward and backward"
            ) from error
        raise BackwardTwiceError("backward through the same forward a second time") from error
    return saved


def run_region(
    run: Run, tensors: Sequence[Tensor], anchor: Tensor | None = None
) -> Sequence[Tensor]:
    """Outputs of a region, with autograd where any input or ``anchor`` wants a gradient."""
    wants = anchor is not None or any(t.requires_grad for t in tensors)
    if torch.is_grad_enabled() and run.code.learns and wants:
        outputs: Sequence[Tensor] = RegionFunction.apply(run, anchor, *tensors)
        return outputs
    with torch.no_grad():
        return run.code.forward(run.state, run.chunk, tensors, run.seed, learn=False)[0]
