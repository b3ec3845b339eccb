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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxmem import masks
from fxmem.errors import BackwardTwiceError, DoubleBackwardError, ModifiedParameterError
from fxmem.program import Free, Loop, Mask, Program, Straight
from fxmem.region_code import RegionCode
from fxmem.sizes import evaluate_shape

Shared = Mapping[int, tuple[Any, bool]]
"""Input position -> (parameter, whether this region returns its whole gradient)."""


@dataclass(slots=True)
class CallState:
    """What one call of the model shares between its regions: sizes, masks already classified,
    and parts of gradients of parameters that several regions use."""

    sizes: dict[str, int]
    tiles: dict[tuple[Any, ...], masks.TileMap] = field(default_factory=dict)
    parts: dict[Any, Tensor] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    """``id`` of each parameter of the call -> its name, for errors."""
    watched: list[tuple[str, Tensor, int]] = field(default_factory=list)
    fresh: set[int] = field(default_factory=set)
    """Storages of gradients between regions that nothing else holds."""

    def watch(self, saved: Sequence[Tensor | None]) -> None:
        """Remember the versions of parameters that a backward will read."""
        for tensor in saved:
            name = self.names.get(id(tensor))
            if tensor is not None and name is not None:
                self.watched.append((name, tensor, tensor._version))

    def begin_backward(self) -> None:
        """Before the first region's backward, so that an error comes before any gradient.

        Afterwards each region only checks what it saved: a hook may step a parameter as soon as
        its gradient is there.

        Raises:
            ModifiedParameterError: a parameter was changed in place since the forward.
        """
        for name, parameter, version in self.watched:
            if parameter._version != version:
                raise ModifiedParameterError(
                    f"parameter `{name}` was changed in place between forward and backward"
                )
        self.watched.clear()


def chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    """``[lo, hi)`` pairs that cover ``length``; the last one may be shorter."""
    return [(lo, min(lo + chunk, length)) for lo in range(0, length, chunk)]


def execute(
    program: Program,
    state: CallState,
    tensors: Sequence[Tensor | None],
    chunk: int,
    counter: Any,
    begin: Mapping[str, Tensor],
) -> list[Tensor | None]:
    """Run a program; ``tensors`` in the order of ``program.inputs``.

    ``begin``: accumulators to start from instead of zeros, by name.
    """
    env: dict[str, Any] = dict(zip(program.inputs, tensors, strict=True))
    parts = chunks(state.sizes.get("T", 1), chunk)
    tiles = {
        m.name: tile_map(m, state, env, parts)
        for m in program.masks
        if all(t in env for t in m.tensors)
    }
    sizes = state.sizes
    device = next((t.device for t in tensors if t is not None and t.dim()), torch.device("cpu"))
    for step in program.steps:
        if isinstance(step, Free):
            for name in step.names:
                del env[name]
        elif isinstance(step, Straight):
            values = step.module(*(sizes[i] for i in step.ints), *(env[t] for t in step.tensors))
            env.update(zip(step.results, values, strict=True))
        else:
            _run_loop(step, program, state, env, parts, tiles, device, begin)
            counter.bodies += len(parts)
    return [None if o is None else _result(program, env, o) for o in program.outputs]


def _run_loop(
    step: Loop,
    program: Program,
    state: CallState,
    env: dict[str, Any],
    parts: list[tuple[int, int]],
    tiles: dict[str, masks.TileMap],
    device: torch.device,
    begin: Mapping[str, Tensor],
) -> None:
    for b in step.allocate:
        if b.name in begin:
            env[b.name] = begin[b.name]
            continue
        make = torch.zeros if b.zero else torch.empty
        env[b.name] = make(evaluate_shape(b.shape, state.sizes), dtype=b.dtype, device=device)
    for name in step.masks:
        if name not in tiles:
            mask = next(m for m in program.masks if m.name == name)
            tiles[name] = tile_map(mask, state, env, parts)
    ints = [state.sizes[i] for i in step.ints]
    tensors = [env[t] for t in step.tensors]
    # A sink takes gradients where they arise, by functions that only the rewritten body calls.
    plain = all(isinstance(t, Tensor) for t in tensors)
    body = step.compiled.bind(tensors) if step.compiled is not None and plain else step.module
    order = range(len(parts) - 1, -1, -1) if step.descending else range(len(parts))
    for i in order:
        spans = [tiles[name].spans[i] for name in step.masks]
        body(*ints, *parts[i], *spans, *tensors)


def _result(program: Program, env: Mapping[str, Any], name: str) -> Tensor:
    value: Tensor = env[name]
    dtype = program.shapes[name][1]
    return value if value.dtype == dtype else value.to(dtype)


def tile_map(
    mask: Mask, state: CallState, env: Mapping[str, Any], parts: list[tuple[int, int]]
) -> masks.TileMap:
    """The classified mask, shared by all regions of the call that use the same one."""
    tensors = [env[t] for t in mask.tensors]
    key = (mask.key, tuple(parts[:1]), *(id(t) for t in tensors))
    if key not in state.tiles:
        ints = [state.sizes[i] for i in mask.ints]
        state.tiles[key] = masks.build(lambda lo, hi: mask.module(*ints, lo, hi, *tensors), parts)
    return state.tiles[key]


class RegionFunction(torch.autograd.Function):
    """``apply(code, state, chunk, seed, shared, sole, hold, *tensors) -> outputs``."""

    @staticmethod
    def forward(
        ctx: Any,
        code: RegionCode,
        state: CallState,
        chunk: int,
        seed: Tensor | None,
        shared: Shared,
        sole: Sequence[bool],
        hold: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        grads, held = None, []  # type: list[Tensor | None] | None, list[Tensor]
        if hold:
            outputs, held = code.forward_held(state, chunk, tensors, seed)
        else:
            outputs, grads = code.forward(state, chunk, tensors, seed, learn=True)
        kept = code.saved(grads is not None, "+" if hold else "")
        saved = [t if k else None for t, k in zip(tensors, kept, strict=True)]
        ctx.save_for_backward(*saved, *held)
        ctx.count = len(saved)
        state.watch(saved)
        ctx.code, ctx.state, ctx.chunk, ctx.seed, ctx.grads = code, state, chunk, seed, grads
        ctx.shared = shared
        ctx.sole = [s for s, d in zip(sole, code.differentiable, strict=True) if d]
        ctx.shapes = [(o.shape, o.dtype, o.device) for o in outputs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, d in zip(outputs, code.differentiable, strict=True) if not d)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError("backward with create_graph=True through a streamed region")
        ctx.state.begin_backward()
        alive = _saved(ctx)
        saved, held = alive[: ctx.count], alive[ctx.count :]
        grads, ctx.grads = ctx.grads, None
        code: RegionCode = ctx.code
        given = [t for t, d in zip(tangents, code.differentiable, strict=True) if d]
        loss = given[code.loss] if sum(t is not None for t in given) == 1 else None
        if grads is not None and loss is not None:
            out = code.scale(grads, loss)
        else:
            shapes = [s for s, d in zip(ctx.shapes, code.differentiable, strict=True) if d]
            full = [
                torch.zeros(s, dtype=dt, device=dev) if t is None else t
                for t, (s, dt, dev) in zip(given, shapes, strict=True)
            ]
            parts = ctx.state.parts
            owned = {i: parts.pop(k) for i, (k, o) in ctx.shared.items() if o and k in parts}
            free = [t is not None and f and _storage(t) in ctx.state.fresh
                    for t, f in zip(given, ctx.sole, strict=True)]  # fmt: skip
            out = code.backward(
                ctx.state, ctx.chunk, saved, ctx.seed, full, owned, free=free, held=held
            )
        _tell_fresh(ctx.state, out, [*saved, *tangents])
        _hand_on(ctx.shared, ctx.state.parts, out)
        return (None, None, None, None, None, None, None, *out)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tell_fresh(
    state: CallState, grads: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> None:
    """Which of these gradients have a storage of their own, which the next backward may reuse."""
    held = {_storage(t) for t in others if t is not None} - state.fresh
    counts = Counter(_storage(g) for g in grads if g is not None)
    for storage, count in counts.items():
        if count == 1 and storage not in held:
            state.fresh.add(storage)
        else:
            state.fresh.discard(storage)


def _hand_on(shared: Shared, parts: dict[Any, Tensor], grads: list[Tensor | None]) -> None:
    """Keep the gradients of parameters that an earlier region will return."""
    for i, (key, owner) in shared.items():
        grad = grads[i]
        if not owner and grad is not None:
            parts[key] = grad if key not in parts else parts[key].add_(grad)
            grads[i] = None


def _saved(ctx: Any) -> Sequence[Any]:
    try:
        saved: Sequence[Any] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
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
    hold: bool = False,
) -> Sequence[Tensor]:
    """Outputs of a region, with autograd where any input wants a gradient.

    ``sole``: which outputs have one reader, another region, so that their gradient comes as that
    region made it. ``hold``: keep ``code.held`` for the backward.
    """
    seed = code.draw_seed(tensors[0].device)
    if torch.is_grad_enabled() and code.learns and any(t.requires_grad for t in tensors):
        sole = sole or [False] * len(code.differentiable)
        shared = shared or {}
        return RegionFunction.apply(code, state, chunk, seed, shared, sole, hold, *tensors)
    with torch.no_grad():
        return code.forward(state, chunk, tensors, seed, learn=False)[0]
