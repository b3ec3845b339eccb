"""Backward of :mod:`chunk_attention`: dQ of the chunk, dK and dV added into float32 prefix buffers.

Letters as in the forward. Two kernels. One goes over the keys of a block of query rows and gives dQ
and ``delta = rowsum(dout * out)``; the other goes over the query rows, and the n query heads of the
group, for a block of keys. Each key block has one owner, so dK and dV are read, added to and
written without atomics: the sum over chunks is the same in every run (FlashAttention-2, Dao 2023,
algorithm 2). Float32 heads above 128 go by parts: :mod:`_attention_wide`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._attention_options import Options, parts, strides
from fxmem.kernels._attention_samples import sample
from fxmem.kernels._attention_tiles import tile_scores
from fxmem.kernels._attention_wide import dkv_wide, dq_wide
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
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    config: Config | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Adds into ``dk [B, G, S, E]`` and ``dv [B, G, S, F]``; returns ``(dq, dsinks [H] or None)``.

    ``dout`` and ``out`` ``[B, H, C, F]``, ``lse [B, H, C]``; options as in the forward.
    """
    given = Options(**options)
    x = given.scores(q, k)
    wide, groups, n = x.dtype, k.shape[1], q.shape[1] // k.shape[1]
    dout, out = dout.to(wide), out.to(wide)
    p = torch.exp(x - lse[..., None].to(wide))
    delta = (dout * out).sum(-1)
    ds = p * (dout @ v.to(wide).repeat_interleave(n, 1).transpose(-1, -2) - delta[..., None])
    if given.softcap:
        ds = ds * (1 - torch.tanh(given.raw_scores(q, k) / given.softcap) ** 2)
    ds = ds * given.scale
    dk += (ds.transpose(-1, -2) @ q.to(wide)).unflatten(1, (groups, n)).sum(2)
    dv += (p.transpose(-1, -2) @ dout).unflatten(1, (groups, n)).sum(2)
    dq = (ds @ k.to(wide).repeat_interleave(n, 1)).to(q.dtype)
    return dq, sink_gradient(given.sinks, lse, delta)


def sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """A sink's weight is ``exp(sink - lse)``; it carries no value, so only ``-delta`` remains."""
    if sinks is None:
        return None
    weight = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


@jit
def _tile_gradient(
    q, k, v, dout, lse, delta, m, n, b, h, rows, keys, offset, window, scale, softcap,
    QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of a tile and the gradient of its unscaled scores."""
    x, masked = tile_scores(
        q, k, m, n, b, h, rows, keys, offset, window, scale, softcap,
        QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
        CAUSAL, WINDOW, SOFTCAP, ADDITIVE, PRECISION,
    )  # fmt: skip
    p = tl.exp(masked - lse[:, None])
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    if SOFTCAP:
        ds = ds * (1 - (x / softcap) * (x / softcap))
    return p, ds * scale


@jit
def _dq(
    DOUT, Q, K, V, OUT, LSE, DQ, DELTA, QSEG, KSEG, VALID, MASK,
    q_b, q_h, q_c, k_b, k_g, k_s, v_b, v_g, v_s, d_b, d_h, d_c, o_b, o_h, o_c,
    mask_b, mask_h, mask_c, mask_s,
    heads, per_group, rows, keys, offset, window, scale, softcap,
    E: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    g = h // per_group
    m = first + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    f = tl.arange(0, BLOCK_F)
    row_e = (m < rows)[:, None] & (e < E)[None, :]
    row_f = (m < rows)[:, None] & (f < F)[None, :]
    m_row = m[:, None].to(tl.int64)
    q = tl.load(Q + b * q_b + h * q_h + m_row * q_c + e[None, :], mask=row_e, other=0.0)
    dout = tl.load(DOUT + b * d_b + h * d_h + m_row * d_c + f[None, :], mask=row_f, other=0.0)
    out = tl.load(OUT + b * o_b + h * o_h + m_row * o_c + f[None, :], mask=row_f, other=0.0)
    row_at = (b * heads + h) * rows + m
    lse = tl.load(LSE + row_at, mask=m < rows, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + row_at, delta, mask=m < rows)
    lo = 0
    hi = keys
    if CAUSAL:
        hi = tl.minimum(keys, first + BLOCK_M + offset)
    if WINDOW:
        lo = tl.maximum(first + offset - window + 1, 0) // BLOCK_N * BLOCK_N
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = (n < keys)[:, None]
        n_row = n[:, None].to(tl.int64)
        k = tl.load(K + b * k_b + g * k_g + n_row * k_s + e[None, :], key & (e < E)[None, :], 0.0)
        v = tl.load(V + b * v_b + g * v_g + n_row * v_s + f[None, :], key & (f < F)[None, :], 0.0)
        _, ds = _tile_gradient(
            q, k, v, dout, lse, delta, m, n, b, h, rows, keys, offset, window, scale, softcap,
            QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
            CAUSAL, WINDOW, SOFTCAP, ADDITIVE, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(DQ + row_at[:, None] * E + e[None, :], dq, mask=row_e)


@jit
def _dkv(
    DOUT, Q, K, V, LSE, DELTA, DK, DV, QSEG, KSEG, VALID, MASK,
    q_b, q_h, q_c, k_b, k_g, k_s, v_b, v_g, v_s, d_b, d_h, d_c,
    dk_b, dk_g, dk_s, dv_b, dv_g, dv_s, mask_b, mask_h, mask_c, mask_s,
    heads, per_group, rows, keys, offset, window, scale, softcap,
    E: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    groups = heads // per_group
    b = (tl.program_id(1) // groups).to(tl.int64)
    g = tl.program_id(1) % groups
    n = first + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    f = tl.arange(0, BLOCK_F)
    key_e = (n < keys)[:, None] & (e < E)[None, :]
    key_f = (n < keys)[:, None] & (f < F)[None, :]
    n_row = n[:, None].to(tl.int64)
    k = tl.load(K + b * k_b + g * k_g + n_row * k_s + e[None, :], mask=key_e, other=0.0)
    v = tl.load(V + b * v_b + g * v_g + n_row * v_s + f[None, :], mask=key_f, other=0.0)
    # Rows [lo, hi) are all that can see a key of the block.
    lo = 0
    hi = rows
    if CAUSAL:
        lo = tl.maximum(first - offset, 0) // BLOCK_M * BLOCK_M
    if WINDOW:
        hi = tl.minimum(rows, first + BLOCK_N - 1 + window - offset)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for h in range(g * per_group, (g + 1) * per_group):
        for start in range(lo, hi, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            m_row = m[:, None].to(tl.int64)
            row_e = (m < rows)[:, None] & (e < E)[None, :]
            row_f = (m < rows)[:, None] & (f < F)[None, :]
            row_at = (b * heads + h) * rows + m
            q = tl.load(Q + b * q_b + h * q_h + m_row * q_c + e[None, :], row_e, 0.0)
            dout = tl.load(DOUT + b * d_b + h * d_h + m_row * d_c + f[None, :], row_f, 0.0)
            lse = tl.load(LSE + row_at, mask=m < rows, other=0.0)
            delta = tl.load(DELTA + row_at, mask=m < rows, other=0.0)
            p, ds = _tile_gradient(
                q, k, v, dout, lse, delta, m, n, b, h, rows, keys, offset, window, scale, softcap,
                QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
                CAUSAL, WINDOW, SOFTCAP, ADDITIVE, PRECISION,
            )  # fmt: skip
            dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    at = DK + b * dk_b + g * dk_g + n_row * dk_s + e[None, :]
    tl.store(at, tl.load(at, mask=key_e, other=0.0) + dk, mask=key_e)
    at = DV + b * dv_b + g * dv_g + n_row * dv_s + f[None, :]
    tl.store(at, tl.load(at, mask=key_f, other=0.0) + dv, mask=key_f)


CONFIGS = (
    config(8, 1, M=64, N=32),
    config(8, 1, M=64, N=64),
    config(4, 2, M=32, N=64),
    config(8, 1, M=32, N=32),
    config(4, 1, M=32, N=32),
    config(4, 1, M=16, N=16),
)


def choose(q: Tensor, f: int) -> Config:
    """The default configuration for a head size and dtype: the widest that spills nothing."""
    widest = max(q.shape[-1], f)
    if q.dtype == torch.float32:
        return CONFIGS[3] if parts(q, f) else CONFIGS[5]
    if on_amd():
        return CONFIGS[4]
    if widest <= 32:
        return CONFIGS[1]
    return CONFIGS[3] if widest > 128 else CONFIGS[0]


def launcher(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    config: Config | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`reference`; ``dk`` and ``dv`` are float32, the stride of their last dimension 1."""
    given = Options(**options)
    b, h, c, e = q.shape
    f, groups, keys = v.shape[-1], k.shape[1], k.shape[2]
    dout, q, k, v, out = (rows_last(x) for x in (dout, q, k, v, out))
    lse = lse.contiguous()
    dq, delta = q.new_empty(b, h, c, e), torch.empty_like(lse)
    config = config or choose(q, f)
    part = parts(q, f)
    blocks = {"BLOCK_E": power_of_2(e, 16), "BLOCK_F": power_of_2(f, 16)}
    shared = {
        "DOUT": dout, "Q": q, "K": k, "V": v, "LSE": lse, "DELTA": delta, **given.arguments(q, k),
        **strides("q_b q_h q_c", q), **strides("k_b k_g k_s", k), **strides("v_b v_g v_s", v),
        **strides("d_b d_h d_c", dout), "heads": h, "per_group": h // groups, "rows": c,
        "keys": keys, "E": e, "F": f, **({"PART": part} if part else blocks),
        "PRECISION": dot_precision(q.dtype),
    }  # fmt: skip
    launch(
        dq_wide if part else _dq,
        (cdiv(c, config.blocks["BLOCK_M"]), b * h, cdiv(e, part) if part else 1),
        config, **shared, **strides("o_b o_h o_c", out), OUT=out, DQ=dq,
    )  # fmt: skip
    launch(
        dkv_wide if part else _dkv,
        (cdiv(keys, config.blocks["BLOCK_N"]), b * groups, cdiv(max(e, f), part) if part else 1),
        config, **shared, DK=dk, DV=dv,
        **strides("dk_b dk_g dk_s", dk), **strides("dv_b dv_g dv_s", dv),
    )  # fmt: skip
    return dq, sink_gradient(given.sinks, lse, delta)


def arguments(forward):
    """Operands of the backward from those of the forward."""
    (q, k, v), given = forward()
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (k, v))
    return (out, q, k, v, out, lse, dk, dv), given


KERNELS = (
    Kernel(
        name="chunk_attention_backward",
        ops=("fxmem.attention_backward.default",),
        signature=signature(
            "b h q f, b h q e, b g k e, b g k f, b h q f, b h q -> b h q e, b g k e, b g k f",
            "k e h g",
            prefix=(2, 3),
            suffix=frozenset((1, 2)),
        ),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=sample(arguments),
        accumulators=("dk", "dv"),
        limits="head sizes up to 256; dk and dv in float32",
    ),
)
