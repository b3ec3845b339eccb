"""Memory of one program, found by running it over fake tensors.

The generated code itself runs, one full chunk per loop, with an allocation watch around it: views
share storage, in-place sums allocate nothing, and a value dies where the code deletes it. Only what
ops allocate inside themselves is a formula here. Nothing is computed, so a profile costs
milliseconds at any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat.memory import StorageWatch
from fxmem.axes.sizes import evaluate_shape, with_chunks
from fxmem.kernels import attention, token_nll
from fxmem.program.body_op import BODY_OPS
from fxmem.program.steps import Exchange, Free, Loop, Mask, Program, Straight
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.tile_map import rows_at_once


@dataclass(frozen=True, slots=True)
class Output:
    """One output: its storage (equal keys share one), that storage's bytes, and its layout."""

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
    """Bytes a program takes above its inputs; ``nodes``: at each node of each loop's body."""

    peak: int
    outputs: tuple[Output | None, ...]
    names: tuple[str | None, ...]
    nodes: tuple[tuple[int, ...], ...]
    masks: tuple[MaskProfile, ...]

    @property
    def bodies(self) -> tuple[int, ...]:
        """Working set of each loop's body."""
        return tuple(max(n) for n in self.nodes)


def body_bytes(code: RegionCode, kind: str, sizes: Mapping[str, int], chunk: int) -> int:
    """Bytes of the working set of the largest loop body for chunks of ``chunk`` tokens.

    ``kind`` is ``forward``, ``loss`` or ``backward``. Buffers and accumulators are not part of it.
    Measured at four points once; then a curve in length and chunk per node of a body, so that
    asking again is cheap.
    """
    rest = {k: v for k, v in sizes.items() if k != "T"}
    key = ("curves", kind, *sorted(rest.items()), torch.get_num_threads())
    if key not in code.derived:
        at = [
            [n for body in profile(code, kind, {**rest, "T": t}, c).nodes for n in body]
            for t, c in ((2048, 128), (2048, 512), (2048, 1024), (4096, 128))
        ]
        code.derived[key] = [_fit(*values) for values in zip(*at, strict=True)]
    length = sizes.get("T", 1)
    rows, tokens = min(chunk, length), length - 2048
    guesses = (a + rows * (b + rows * c) + d * tokens for a, b, c, d in code.derived[key])
    return max(0, round(max(guesses, default=0)))


def _fit(small: int, middle: int, large: int, long: int) -> tuple[float, float, float, float]:
    """``a + b C + c C^2 + d (T - 2048)`` through the four measured points of :func:`body_bytes`."""
    first, second = (middle - small) / 384, (large - middle) / 512
    c = (second - first) / 896
    b = first - c * 640
    return small - 128 * b - 128**2 * c, b, c, (long - small) / 2048


def profile(
    code: RegionCode, kind: str, sizes: Mapping[str, int], chunk: int, begin: Sequence[str] = ()
) -> Profile:
    """Memory of the program ``kind`` of a region; cached.

    ``begin``: accumulators that start from a tensor that is there already.
    """
    causal = (kind, False) not in code.programs
    chunk = max(1, min(chunk, sizes.get("T", chunk)))
    threads = torch.get_num_threads()
    key = ("profile", kind, causal, *sorted(sizes.items()), chunk, *begin, threads)
    if key not in code.derived:
        devices = [v.device for v in code.values]
        program = code.program(kind, causal)
        code.derived[key] = run_fake(program, sizes, chunk, devices, begin)
    found: Profile = code.derived[key]
    return found


def run_fake(
    program: Program, sizes: Mapping[str, int], chunk: int, devices: Sequence[torch.device],
    begin: Sequence[str], fill: Callable[[dict[str, Any]], None] | None = None,
) -> Profile:  # fmt: skip
    """Memory of a program; ``fill`` may put other things than tensors in place of its inputs."""
    sizes = with_chunks(sizes, chunk)
    watch = StorageWatch(inside_op)
    home = devices[0] if devices else torch.device("cpu")
    nodes: list[tuple[int, ...]] = []
    with _compat.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        env: dict[str, Any] = {}
        for i, name in enumerate(program.inputs):
            shape, dtype = program.shapes[name]
            at = devices[i] if i < len(devices) else home
            env[name] = torch.empty(evaluate_shape(shape, sizes), dtype=dtype, device=at)
        for b in (b for step in program.loops for b in step.allocate if b.name in begin):
            env[b.name] = torch.empty(evaluate_shape(b.shape, sizes), dtype=b.dtype, device=home)
        watch.ignore(list(env.values()))
        if fill is not None:
            fill(env)
        masks = tuple(_mask(m, program, env, sizes, chunk) for m in program.masks)
        with watch:
            for step in program.steps:
                if isinstance(step, Free):
                    for name in step.names:
                        del env[name]
                elif isinstance(step, Straight):
                    given = [*(sizes[i] for i in step.ints), *(env[t] for t in step.tensors)]
                    env.update(
                        zip(step.results, _compat_hooks.function(step.module)(*given), strict=True)
                    )
                    del given
                elif isinstance(step, Exchange):
                    # a rank's rows count as all, so that this is no less than a rank takes
                    env.update(
                        (r, torch.empty_like(env[t]))
                        for t, r in zip(step.tensors, step.results, strict=True) if t != r
                    )  # fmt: skip
                else:
                    nodes.append(_loop(step, env, sizes, chunk, watch, home))
            results = [None if o is None else _result(program, env, o) for o in program.outputs]
        outputs = tuple(
            None if r is None else Output(*watch.owner(r), r.is_contiguous()) for r in results
        )
    return Profile(watch.peak, outputs, tuple(program.outputs), tuple(nodes), masks)


def _result(program: Program, env: Mapping[str, Any], name: str) -> Tensor:
    value: Tensor = env[name]
    dtype = program.shapes[name][1]
    return value if value.dtype == dtype else value.to(dtype)


class _Body(fx.Interpreter):
    """Runs a body node by node, with the lifetimes of the generated code.

    ``used``: the peak during each node, above what was alive before the body.
    """

    def __init__(self, module: fx.GraphModule, watch: StorageWatch) -> None:
        super().__init__(module)
        self.watch, self.base = watch, watch.live
        self.used: list[int] = []

    def run_node(self, n: fx.Node) -> Any:
        self.watch.peak = self.watch.live
        result = super().run_node(n)
        self.used.append(self.watch.peak - self.base)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        known = BODY_OPS.get(target)
        average = known.average if known is not None else None
        return super().call_function(average or target, args, kwargs)


def _loop(
    step: Loop, env: dict[str, Any], sizes: Mapping[str, int], chunk: int, watch: StorageWatch,
    device: torch.device,
) -> tuple[int, ...]:  # fmt: skip
    """Run the body on the last full chunk, which sees the most keys; its bytes, node by node."""
    for b in step.allocate:
        if b.start:
            env[b.name] = env[b.start].to(b.dtype, copy=True)
        if b.name not in env:
            make = torch.zeros if b.zero else torch.empty
            env[b.name] = make(evaluate_shape(b.shape, sizes), dtype=b.dtype, device=device)
    length = sizes.get("T", 1)
    hi = length - length % chunk
    spans = [_spans(hi - chunk, hi, device)] * len(step.masks)
    earlier = watch.peak
    body = _Body(step.module, watch)
    bounds = (hi - chunk, hi, hi - chunk)[: len(step.bounds)]
    body.run(*(sizes[i] for i in step.ints), *bounds, *spans, *(env[t] for t in step.tensors))
    watch.peak = max(earlier, body.base + max(body.used))
    return tuple(body.used)


def _spans(lo: int, hi: int, device: torch.device) -> tuple[attention.Span, ...]:
    """The keys a chunk of a causal mask sees: all before it, and a mixed tile."""
    past = (attention.Span(0, lo),) if lo else ()
    tile = torch.empty(1, 1, hi - lo, hi - lo, dtype=torch.bool, device=device)
    return (*past, attention.Span(lo, hi, tile))


def _mask(
    mask: Mask, program: Program, env: Mapping[str, Any], sizes: Mapping[str, int], chunk: int
) -> MaskProfile:
    at = {n: i for i, n in enumerate(program.inputs)}
    inputs = tuple(at.get(t, -1) for t in mask.tensors)
    if -1 in inputs:
        return MaskProfile(mask.key, inputs, 0, 0)
    watch = StorageWatch(inside_op)
    watch.ignore([env[t] for t in mask.tensors])

    def rows(count: int) -> Tensor:
        found: Tensor = _compat_hooks.function(mask.module)(
            *(sizes[i] for i in mask.ints), 0, count, *(env[t] for t in mask.tensors)
        )
        return found

    with watch:
        row = rows(1)
        rows(min(chunk, rows_at_once(row)))
    # one mixed tile of chunk x chunk stays per chunk; it is joined from pieces
    tile = row.shape[:-2].numel() * row.dtype.itemsize * chunk * chunk
    parts = math.ceil(sizes["T"] / chunk)
    return MaskProfile(mask.key, inputs, watch.peak + tile, parts * tile)


def inside_op(op: Any, args: Sequence[Any]) -> int:
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
