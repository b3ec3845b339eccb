"""Running a program: its loops, and what the regions of a call share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem.axes.sizes import T, evaluate_shape, with_chunks
from fxmem.errors import ModifiedParameterError
from fxmem.program.steps import Exchange, Free, Loop, Mask, Program, Straight
from fxmem.runtime import tile_map as masks
from fxmem.runtime.offload import Leaving
from fxmem.runtime.ranks import Placed, Ranks
from fxmem.runtime.sharding import Sharding
from fxmem.runtime.shared_grads import SharedGrads


@dataclass(slots=True)
class Versions:
    """Of the parameters that the backwards of a call will read."""

    watched: list[tuple[str, Tensor, int]] = field(default_factory=list)
    entered: int = -1
    """The latest autograd pass that has run a backward of the call."""

    def check(self) -> None:
        """Once per pass, before its first region's backward, so that an error comes before any
        gradient.

        Raises:
            ModifiedParameterError: a parameter was changed in place since the forward.
        """
        if (number := _compat.backward_id()) <= self.entered:
            return
        for name, parameter, version in self.watched:
            if parameter._version != version:
                raise ModifiedParameterError(
                    f"parameter `{name}` was changed in place between forward and backward"
                )
        self.entered = number


@dataclass(slots=True)
class CallState:
    """What one call of the model shares between its regions: sizes, masks already classified,
    and parts of gradients of parameters that several regions use."""

    sizes: dict[str, int]
    tiles: dict[tuple[Any, ...], tuple[masks.TileMap, list[Tensor]]] = field(default_factory=dict)
    """By formula and tensors, which are held so that no other tensor gets the ``id`` of one."""
    shared: SharedGrads = field(default_factory=SharedGrads)
    names: Mapping[int, str] = field(default_factory=dict)
    """``id`` of each parameter of the call -> its name, for errors."""
    versions: Versions = field(default_factory=Versions)
    fresh: set[int] = field(default_factory=set)
    """Storages of gradients on their way between regions that nothing else holds."""
    sharding: Sharding | None = None
    leaving: Leaving | None = None
    """Moves saved tensors off the device."""
    ranks: Ranks | None = None
    """Those that stream this call together."""

    def watch(self, saved: Sequence[Tensor | None]) -> None:
        """Remember the versions of parameters that a backward will read."""
        for tensor in saved:
            name = self.names.get(id(tensor))
            if tensor is not None and name is not None:
                if self.sharding is not None:
                    tensor = self.sharding.shard(tensor)
                self.versions.watched.append((name, tensor, tensor._version))

    def chunks(self, chunk: int) -> list[tuple[int, ...]]:
        """The bounds of each chunk that this process runs, in order."""
        if self.ranks is not None:
            return self.ranks.chunks(chunk)
        return list(chunks(self.sizes.get("T", 1), chunk))


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
    parts = state.chunks(chunk)
    sizes = with_chunks(state.sizes, chunk)
    tiles = {
        m.name: tile_map(m, state, env, parts)
        for m in program.masks
        if all(t in env for t in m.tensors)
    }
    device = next((t.device for t in tensors if t is not None and t.dim()), torch.device("cpu"))
    for step in program.steps:
        if isinstance(step, Free):
            for name in step.names:
                env.pop(name, None)  # a scatter has taken its sums out already
        elif isinstance(step, Straight):
            values = _compat_hooks.function(step.module)(
                *(sizes[i] for i in step.ints), *(env[t] for t in step.tensors)
            )
            env.update(zip(step.results, values, strict=True))
        elif isinstance(step, Exchange):
            assert state.ranks is not None
            shapes = [evaluate_shape(s, sizes) for s in step.shapes]
            given = [env.pop(t) if step.kind == "scatter" else env[t] for t in step.tensors]
            where = [None if c is None else Placed.of(c, sizes) for c in step.cuts]
            made = state.ranks.exchange(step.kind, given, where, shapes)
            env.update(zip(step.results, made, strict=True))
            del given, made
        else:
            _run_loop(step, program, state, sizes, env, parts, tiles, device, begin)
            counter.bodies += len(parts)
    return [None if o is None else _result(program, env, o) for o in program.outputs]


def _run_loop(
    step: Loop,
    program: Program,
    state: CallState,
    sizes: Mapping[str, int],
    env: dict[str, Any],
    parts: list[tuple[int, ...]],
    tiles: dict[str, masks.TileMap],
    device: torch.device,
    begin: Mapping[str, Tensor],
) -> None:
    rows = sizes if state.ranks is None else {**sizes, str(T): state.ranks.rows}
    for b in step.allocate:
        if b.name in begin:
            env[b.name] = begin[b.name]
            continue
        if b.start:
            env[b.name] = env[b.start].to(b.dtype, copy=True)
            continue
        make = torch.zeros if b.zero else torch.empty
        shape = evaluate_shape(b.shape, rows if b.local else sizes)
        env[b.name] = make(shape, dtype=b.dtype, device=device)
    for name in step.masks:
        if name not in tiles:
            mask = next(m for m in program.masks if m.name == name)
            tiles[name] = tile_map(mask, state, env, parts)
    ints = [sizes[i] for i in step.ints]
    tensors = [env[t] for t in step.tensors]
    # A sink takes gradients where they arise, by functions that only the rewritten body calls.
    plain = all(isinstance(t, Tensor) for t in tensors)
    body = (
        step.compiled.bind(tensors)
        if step.compiled is not None and plain
        else _compat_hooks.function(step.module)
    )
    order = range(len(parts) - 1, -1, -1) if step.descending else range(len(parts))
    for i in order:
        spans = [tiles[name].spans[i] for name in step.masks]
        body(*ints, *parts[i], *spans, *tensors)


def _result(program: Program, env: Mapping[str, Any], name: str) -> Tensor:
    value: Tensor = env[name]
    dtype = program.shapes[name][1]
    return value if value.dtype == dtype else value.to(dtype)


def tile_map(
    mask: Mask, state: CallState, env: Mapping[str, Any], parts: Sequence[tuple[int, ...]]
) -> masks.TileMap:
    """The classified mask, shared by all regions of the call that use the same one."""
    tensors = [env[t] for t in mask.tensors]
    sizes = with_chunks(state.sizes, parts[0][1] - parts[0][0] if parts else 1)
    ints = [sizes[i] for i in mask.ints]
    key = (mask.key, *ints, tuple(parts[:1]), len(parts), *(id(t) for t in tensors))
    if key not in state.tiles:
        tiles = masks.build(
            lambda lo, hi: _compat_hooks.function(mask.module)(*ints, lo, hi, *tensors),
            [(part[0], part[1]) for part in parts],
        )
        state.tiles[key] = tiles, tensors
    return state.tiles[key][0]


def is_causal(
    program: Program, state: CallState, chunk: int, tensors: Sequence[Tensor | None]
) -> bool:
    """No attention mask of these inputs shows a later key."""
    env = dict(zip(program.inputs, tensors, strict=True))
    parts = chunks(state.sizes["T"], chunk)
    ordered = [m for m in program.masks if m.ordered]
    known = [m for m in ordered if all(t in env for t in m.tensors)]
    return len(known) == len(ordered) and all(tile_map(m, state, env, parts).causal for m in known)


def accumulators(program: Program, start: dict[int, Tensor]) -> dict[str, Tensor]:
    """Which of ``start`` can be the accumulator of its gradient."""
    sums, found = {b.name: b for step in program.loops for b in step.allocate if b.zero}, {}
    for i, part in start.items():
        name = program.outputs[i]
        if name in sums and sums[name].dtype == part.dtype and part.is_contiguous():
            found[name] = part
    return found
