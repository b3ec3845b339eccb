"""Backward of attention for heads too wide for the registers of one program: float32 above 128.

As :mod:`chunk_attention_backward`, but heads are read ``PART`` columns at a time, and each program
makes ``PART`` columns of its gradients. All programs of a block make its scores again, and the same
``delta``: registers are bought with arithmetic.
"""

from __future__ import annotations

from fxmem.kernels._attention_tiles import hide, product
from fxmem.kernels._triton import jit, tl


@jit
def _tile_gradient(
    Q, K, V, DOUT, lse, delta, m, n, b, h, rows, keys, q_c, k_s, v_s, d_c,
    offset, window, scale, softcap, QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
    E: tl.constexpr, F: tl.constexpr, PART: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights of a tile and the gradient of its unscaled scores; pointers are those of a head."""
    x = product(Q, K, m, n, rows, keys, q_c, k_s, E, PART, PRECISION, BLOCK_M, BLOCK_N)
    x, masked = hide(
        x * scale, m, n, b, h, rows, keys, offset, window, softcap,
        QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
        CAUSAL, WINDOW, SOFTCAP, ADDITIVE,
    )  # fmt: skip
    p = tl.exp(masked - lse[:, None])
    dp = product(DOUT, V, m, n, rows, keys, d_c, v_s, F, PART, PRECISION, BLOCK_M, BLOCK_N)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * (1 - (x / softcap) * (x / softcap))
    return p, ds * scale


@jit
def dq_wide(
    DOUT, Q, K, V, OUT, LSE, DQ, DELTA, QSEG, KSEG, VALID, MASK,
    q_b, q_h, q_c, k_b, k_g, k_s, v_b, v_g, v_s, d_b, d_h, d_c, o_b, o_h, o_c,
    mask_b, mask_h, mask_c, mask_s,
    heads, per_group, rows, keys, offset, window, scale, softcap,
    E: tl.constexpr, F: tl.constexpr, PART: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    g = h // per_group
    m = first + tl.arange(0, BLOCK_M)
    e = (tl.program_id(2) * PART + tl.arange(0, PART))[None, :]
    q = Q + b * q_b + h * q_h
    k = K + b * k_b + g * k_g
    v = V + b * v_b + g * v_g
    dout = DOUT + b * d_b + h * d_h
    out = OUT + b * o_b + h * o_h
    row_at = (b * heads + h) * rows + m
    lse = tl.load(LSE + row_at, mask=m < rows, other=0.0)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(0, F, PART):
        f = (part + tl.arange(0, PART))[None, :]
        row_f = (m < rows)[:, None] & (f < F)
        one = tl.load(dout + m[:, None].to(tl.int64) * d_c + f, row_f, 0.0)
        two = tl.load(out + m[:, None].to(tl.int64) * o_c + f, row_f, 0.0)
        delta += tl.sum(one.to(tl.float32) * two.to(tl.float32), 1)
    tl.store(DELTA + row_at, delta, mask=m < rows)
    lo = 0
    hi = keys
    if CAUSAL:
        hi = tl.minimum(keys, first + BLOCK_M + offset)
    if WINDOW:
        lo = tl.maximum(first + offset - window + 1, 0) // BLOCK_N * BLOCK_N
    dq = tl.zeros((BLOCK_M, PART), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        _, ds = _tile_gradient(
            q, k, v, dout, lse, delta, m, n, b, h, rows, keys, q_c, k_s, v_s, d_c,
            offset, window, scale, softcap, QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
            E, F, PART, CAUSAL, WINDOW, SOFTCAP, ADDITIVE, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        own = tl.load(k + n[:, None].to(tl.int64) * k_s + e, (n < keys)[:, None] & (e < E), 0.0)
        dq = tl.dot(ds.to(own.dtype), own, dq, input_precision=PRECISION)
    tl.store(DQ + row_at[:, None] * E + e, dq, mask=(m < rows)[:, None] & (e < E))


@jit
def dkv_wide(
    DOUT, Q, K, V, LSE, DELTA, DK, DV, QSEG, KSEG, VALID, MASK,
    q_b, q_h, q_c, k_b, k_g, k_s, v_b, v_g, v_s, d_b, d_h, d_c,
    dk_b, dk_g, dk_s, dv_b, dv_g, dv_s, mask_b, mask_h, mask_c, mask_s,
    heads, per_group, rows, keys, offset, window, scale, softcap,
    E: tl.constexpr, F: tl.constexpr, PART: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    groups = heads // per_group
    b = (tl.program_id(1) // groups).to(tl.int64)
    g = tl.program_id(1) % groups
    n = first + tl.arange(0, BLOCK_N)
    n_row = n[:, None].to(tl.int64)
    i = (tl.program_id(2) * PART + tl.arange(0, PART))[None, :]
    k = K + b * k_b + g * k_g
    v = V + b * v_b + g * v_g
    # Rows [lo, hi) are all that can see a key of the block.
    lo = 0
    hi = rows
    if CAUSAL:
        lo = tl.maximum(first - offset, 0) // BLOCK_M * BLOCK_M
    if WINDOW:
        hi = tl.minimum(rows, first + BLOCK_N - 1 + window - offset)
    dk = tl.zeros((BLOCK_N, PART), tl.float32)
    dv = tl.zeros((BLOCK_N, PART), tl.float32)
    for h in range(g * per_group, (g + 1) * per_group):
        q = Q + b * q_b + h * q_h
        dout = DOUT + b * d_b + h * d_h
        for start in range(lo, hi, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            m_row = m[:, None].to(tl.int64)
            row = (m < rows)[:, None]
            row_at = (b * heads + h) * rows + m
            lse = tl.load(LSE + row_at, mask=m < rows, other=0.0)
            delta = tl.load(DELTA + row_at, mask=m < rows, other=0.0)
            p, ds = _tile_gradient(
                q, k, v, dout, lse, delta, m, n, b, h, rows, keys, q_c, k_s, v_s, d_c,
                offset, window, scale, softcap,
                QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
                E, F, PART, CAUSAL, WINDOW, SOFTCAP, ADDITIVE, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            own = tl.load(dout + m_row * d_c + i, row & (i < F), 0.0)
            dv = tl.dot(tl.trans(p.to(own.dtype)), own, dv, input_precision=PRECISION)
            own = tl.load(q + m_row * q_c + i, row & (i < E), 0.0)
            dk = tl.dot(tl.trans(ds.to(own.dtype)), own, dk, input_precision=PRECISION)
    key_e = (n < keys)[:, None] & (i < E)
    key_f = (n < keys)[:, None] & (i < F)
    at = DK + b * dk_b + g * dk_g + n_row * dk_s + i
    tl.store(at, tl.load(at, mask=key_e, other=0.0) + dk, mask=key_e)
    at = DV + b * dv_b + g * dv_g + n_row * dv_s + i
    tl.store(at, tl.load(at, mask=key_f, other=0.0) + dv, mask=key_f)
