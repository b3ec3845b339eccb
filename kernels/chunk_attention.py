"""Attention of a chunk of queries against a prefix of keys, the mask given as structure.

Letters: B batch, H query heads, G key/value heads (H = n G), C query rows, S keys, E head size, F
value size. What a row sees is said by :class:`~fxmem.kernels._attention_options.Options`. Tiles
that causality or the window hide entirely are never visited. The n query heads of a group read the
same keys; nothing is repeated. One pass over the keys with a running maximum and sum
(FlashAttention-2, Dao 2023, algorithm 1). A row that sees nothing gives zeros and a logsumexp of 0,
or of its sink.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._attention_options import Options, parts, strides
from fxmem.kernels._attention_samples import sample
from fxmem.kernels._attention_tiles import hide, product, tile_scores
from fxmem.kernels._triton import (
    Config,
    cdiv,
    config,
    dot_precision,
    jit,
    launch,
    on_amd,
    power_of_2,
    tl,
)
from fxmem.kernels.kernel import Kernel, signature
from fxmem.kernels.layout import rows_last


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: Config | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``q [B, H, C, E]``, ``k [B, G, S, E]``, ``v [B, G, S, F]`` -> ``(out [B, H, C, F], lse [B,
    H, C])``; ``lse`` is float32 (float64 for float64). ``options`` are those of
    :class:`~fxmem.kernels._attention_options.Options`.
    """
    given = Options(**options)
    x = given.scores(q, k)
    lse = torch.logsumexp(x, -1)
    if given.sinks is not None:
        lse = torch.logaddexp(lse, given.sinks.to(lse.dtype)[None, :, None])
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    n = q.shape[1] // k.shape[1]
    p = torch.exp(x - lse[..., None])
    return (p @ v.to(p.dtype).repeat_interleave(n, 1)).to(q.dtype), lse


@jit
def _forward(
    Q, K, V, OUT, LSE, QSEG, KSEG, VALID, MASK, SINKS,
    q_b, q_h, q_c, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mask_h, mask_c, mask_s,
    heads, per_group, rows, keys, offset, window, scale, softcap,
    E: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    PART: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where ``PART`` is set, a program makes ``BLOCK_F`` of the columns and reads ``PART`` of those
    of Q and K at a time; all programs of a block write the same logsumexp.
    """
    first = tl.program_id(0) * BLOCK_M
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    g = h // per_group
    m = first + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    f = tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = (m < rows)[:, None]
    q_head = Q + b * q_b + h * q_h
    k_head = K + b * k_b + g * k_g
    if not PART:
        at = q_head + m[:, None].to(tl.int64) * q_c + e[None, :]
        q = tl.load(at, mask=row & (e < E)[None, :], other=0.0)
    # Keys [lo, hi) are all that any row of the block can see.
    lo = 0
    hi = keys
    if CAUSAL:
        hi = tl.minimum(keys, first + BLOCK_M + offset)
    if WINDOW:
        lo = tl.maximum(first + offset - window + 1, 0) // BLOCK_N * BLOCK_N
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = (n < keys)[:, None]
        n_row = n[:, None].to(tl.int64)
        if PART:
            x = product(
                q_head, k_head, m, n, rows, keys, q_c, k_s, E, PART, PRECISION, BLOCK_M, BLOCK_N
            )
            _, x = hide(
                x * scale, m, n, b, h, rows, keys, offset, window, softcap,
                QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
                CAUSAL, WINDOW, SOFTCAP, ADDITIVE,
            )  # fmt: skip
        else:
            k = tl.load(k_head + n_row * k_s + e[None, :], key & (e < E)[None, :], 0.0)
            _, x = tile_scores(
                q, k, m, n, b, h, rows, keys, offset, window, scale, softcap,
                QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
                CAUSAL, WINDOW, SOFTCAP, ADDITIVE, PRECISION,
            )  # fmt: skip
        new = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp(x - base[:, None])
        keep = tl.exp(top - base)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(V + b * v_b + g * v_g + n_row * v_s + f[None, :], key & (f < F)[None, :], 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        top = new
    if SINKS is not None:
        sink = tl.load(SINKS + h).to(tl.float32)
        new = tl.maximum(top, sink)
        keep = tl.exp(top - new)
        total = total * keep + tl.exp(sink - new)
        acc = acc * keep[:, None]
        top = new
    alive = total > 0
    out = acc / tl.where(alive, total, 1.0)[:, None]
    lse = tl.where(alive, top + tl.log(tl.where(alive, total, 1.0)), 0.0)
    row_at = (b * heads + h) * rows + m
    tl.store(LSE + row_at, lse, mask=m < rows)
    tl.store(OUT + row_at[:, None] * F + f[None, :], out, mask=row & (f < F)[None, :])


CONFIGS = (
    config(4, 2, M=64, N=64),
    config(8, 2, M=128, N=64),
    config(4, 3, M=64, N=32),
    config(8, 1, M=128, N=32),
    config(8, 1, M=64, N=32),
    config(8, 1, M=32, N=32),
)


def choose(q: Tensor, f: int) -> Config:
    """The default configuration for a head size and dtype: the widest that spills nothing."""
    if q.dtype == torch.float32:
        return CONFIGS[5]
    if max(q.shape[-1], f) > 128:
        return CONFIGS[4]
    return CONFIGS[3] if on_amd() else CONFIGS[0]


def launcher(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: Config | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`reference`. Any strides but the last; the head sizes are at most 256."""
    given = Options(**options)
    b, h, c, e = q.shape
    f = v.shape[-1]
    q, k, v = (rows_last(x) for x in (q, k, v))
    out, lse = q.new_empty(b, h, c, f), q.new_empty(b, h, c, dtype=torch.float32)
    config = config or choose(q, f)
    part = parts(q, f)
    width = part or power_of_2(f, 16)
    launch(
        _forward, (cdiv(c, config.blocks["BLOCK_M"]), b * h, cdiv(f, width)), config,
        Q=q, K=k, V=v, OUT=out, LSE=lse, SINKS=given.sinks, **given.arguments(q, k),
        **strides("q_b q_h q_c", q), **strides("k_b k_g k_s", k), **strides("v_b v_g v_s", v),
        heads=h, per_group=h // k.shape[1], rows=c, keys=k.shape[2],
        E=e, F=f, BLOCK_E=power_of_2(e, 16), BLOCK_F=width, PART=part,
        PRECISION=dot_precision(q.dtype),
    )  # fmt: skip
    return out, lse


KERNELS = (
    Kernel(
        name="chunk_attention",
        ops=("fxmem.attention.default",),
        signature=signature(
            "b h q e, b g k e, b g k f -> b h q f, b h q", "k e f h g", prefix=(1, 2)
        ),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=sample(),
        limits="head sizes up to 256",
    ),
)
