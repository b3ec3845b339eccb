"""Memory of one program, found by running it over fake tensors.

The generated code itself runs, one full chunk per loop, with an allocation watch around it: views share
storage, in-place sums allocate nothing, and a value dies where the code deletes it. Only what ops allocate
inside themselves is a formula here. Nothing is computed, so a profile costs milliseconds at any length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmem import _compat
from fxmem._compat_memory import StorageWatch
from fxmem.kernels import attention, token_nll
from fxmem.program import Free, Loop, Mask, Program, Straight
from fxmem.region_code import RegionCode
from fxmem.sizes import evaluate_shape


@dataclass(frozen=True, slots=True)
class Output:
    """One output: its storage (equal keys share one), the storage's bytes and the tensor's layout."""

    storage: int
    bytes: int
    contiguous: bool


@dataclass(frozen=True, slots=True)
class MaskProfile:
    """Bytes of a classified mask: while it is built, and kept until the end of the step."""

    key: str
    inputs: tuple[int, ...]
    transient: int
    kept: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Bytes a program takes above its inputs. ``bodies``: working set of each loop's body."""

    peak: int
    outputs: tuple[Output | None, ...]
    bodies: tuple[int, ...]
    masks: tuple[MaskProfile, ...]


_PROFILES: dict[tuple[Any, ...], Profile] = {}


def body_bytes(code: RegionCode, kind: str, sizes: Mapping[str, int], chunk: int) -> int:
    """Bytes of the working set of the largest loop body for chunks of ``chunk`` tokens.

    ``kind`` is ``forward``, ``loss`` or ``backward``. Buffers and accumulators are not part of it.
    """
    return max(profile(code, kind, sizes, chunk).bodies, default=0)


def profile(code: RegionCode, kind: str, sizes: Mapping[str, int], chunk: int) -> Profile:
    """Memory of the program ``kind`` of a region; cached."""
    program = code.program(kind, causal=(kind, False) not in code.programs)
    chunk = min(chunk, sizes.get("T", chunk))
    key = (id(program), *sorted(sizes.items()), chunk, torch.get_num_threads())
    if key not in _PROFILES:
        devices = [v.device for v in code.values]
        _PROFILES[key] = _run(program, sizes, chunk, devices)
    return _PROFILES[key]


def _run(
    program: Program, sizes: Mapping[str, int], chunk: int, devices: Sequence[torch.device]
) -> Profile:
    watch = StorageWatch(_inside)
    home = devices[0] if devices else torch.device("cpu")
    bodies = []
    with _compat.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        env: dict[str, Any] = {}
        for i, name in enumerate(program.inputs):
            shape, dtype = program.shapes[name]
            at = devices[i] if i < len(devices) else home
            env[name] = torch.empty(evaluate_shape(shape, sizes), dtype=dtype, device=at)
        watch.ignore(list(env.values()))
        masks = [_mask(m, program, env, sizes, chunk) for m in program.masks]
        with watch:
            for step in program.steps:
                if isinstance(step, Free):
                    for name in step.names:
                        del env[name]
                elif isinstance(step, Straight):
                    given = [*(sizes[i] for i in step.ints), *(env[t] for t in step.tensors)]
                    env.update(zip(step.results, step.module(*given), strict=True))
                    del given
                else:
                    bodies.append(_loop(step, program, env, sizes, chunk, watch, home))
            results = [None if o is None else _result(program, env, o) for o in program.outputs]
        watch.settle()
        outputs = tuple(
            None if r is None else Output(*watch.owner(r), r.is_contiguous()) for r in results
        )
    return Profile(watch.peak, outputs, tuple(bodies), tuple(masks))


def _result(program: Program, env: Mapping[str, Any], name: str) -> Tensor:
    value: Tensor = env[name]
    dtype = program.shapes[name][1]
    return value if value.dtype == dtype else value.to(dtype)


def _loop(
    step: Loop, program: Program, env: dict[str, Any], sizes: Mapping[str, int], chunk: int,
    watch: StorageWatch, device: torch.device,
) -> int:  # fmt: skip
    """Run the body on the last full chunk, which sees the most keys; bytes above what is alive before."""
    for b in step.allocate:
        make = torch.zeros if b.zero else torch.empty
        env[b.name] = make(evaluate_shape(b.shape, sizes), dtype=b.dtype, device=device)
    length = sizes.get("T", 1)
    hi = length - length % chunk
    lo = hi - chunk
    spans = [_spans(next(m for m in program.masks if m.name == n), env, sizes, lo, hi, device)
             for n in step.masks]  # fmt: skip
    before, earlier = watch.settle(), watch.peak
    watch.peak = before
    step.module(*(sizes[i] for i in step.ints), lo, hi, *spans, *(env[t] for t in step.tensors))
    used = watch.peak - before
    watch.peak = max(earlier, watch.peak)
    return used


def _spans(
    mask: Mask, env: Mapping[str, Any], sizes: Mapping[str, int], lo: int, hi: int, device: torch.device
) -> tuple[attention.Span, ...]:  # fmt: skip
    """The keys a causal chunk sees; its last tile is mixed. Tiles are counted with the mask, not here."""
    del mask, env, sizes
    past = (attention.Span(0, lo),) if lo else ()
    tile = _outside(lambda: torch.empty(1, 1, hi - lo, hi - lo, dtype=torch.bool, device=device))
    return (*past, attention.Span(lo, hi, tile))


def _outside(make: Any) -> Tensor:
    return make()


def _mask(
    mask: Mask, program: Program, env: Mapping[str, Any], sizes: Mapping[str, int], chunk: int
) -> MaskProfile:
    at = {n: i for i, n in enumerate(program.inputs)}
    inputs = tuple(at.get(t, -1) for t in mask.tensors)
    if -1 in inputs:
        return MaskProfile(mask.key, inputs, 0, 0)
    watch = StorageWatch(_inside)
    watch.ignore([env[t] for t in mask.tensors])
    with watch:
        rows = mask.module(*(sizes[i] for i in mask.ints), 0, chunk, *(env[t] for t in mask.tensors))
        head = rows.shape[:-2].numel() * rows.dtype.itemsize
    row_bytes = head * chunk * sizes["T"]
    # expanded rows are copied flat, twice; one mixed tile of chunk x chunk stays per chunk
    flat = 0 if rows.shape[-2] == chunk else row_bytes
    parts = math.ceil(sizes["T"] / chunk)
    return MaskProfile(
        mask.key, inputs, max(watch.peak, watch.live + 2 * flat), parts * head * chunk * chunk
    )


def _inside(op: Any, args: Sequence[Any]) -> int:
    """Bytes that an op of the CPU allocates and frees within itself."""
    name = str(op)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None or first.device.type != "cpu":
        return 0
    if name.startswith("aten._scaled_dot_product_flash_attention_for_cpu"):
        backward = "backward" in name
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        return torch.get_num_threads() * _flash_bytes(query, key, backward)
    if name.startswith("fxmem.token_nll.default"):
        return min(token_nll.TILE, first.numel()) * first.dtype.itemsize
    if name.startswith("aten.logsumexp"):
        return first.numel() * first.dtype.itemsize
    return 0


def _flash_bytes(query: Tensor, key: Tensor, backward: bool) -> int:
    """Score blocks of one thread."""
    rows, keys = query.shape[2], key.shape[2]
    block = min(256 if rows >= 768 else 64 if rows >= 192 else 32, rows)
    tile = block * min(512, keys)
    return 4 * (2 * tile if backward else tile + block * query.shape[3])
