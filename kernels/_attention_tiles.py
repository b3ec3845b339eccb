"""Scores of a tile of query rows and keys, and what the mask hides in it; for attention kernels."""

from __future__ import annotations

from fxmem.kernels._device import tanh
from fxmem.kernels._triton import jit, tl


@jit
def hide(
    x, m, n, b, h, rows, keys, offset, window, softcap,
    QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
):  # fmt: skip
    """Scaled scores of a tile: capped, and with what is hidden at -inf."""
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    seen = (m < rows)[:, None] & (n < keys)[None, :]
    if CAUSAL:
        seen = seen & (n[None, :] <= m[:, None] + offset)
    if WINDOW:
        seen = seen & (n[None, :] > m[:, None] + offset - window)
    if QSEG is not None:
        q_segment = tl.load(QSEG + b * rows + m, mask=m < rows, other=0)
        k_segment = tl.load(KSEG + b * keys + n, mask=n < keys, other=0)
        seen = seen & (q_segment[:, None] == k_segment[None, :])
    if VALID is not None:
        seen = seen & (tl.load(VALID + b * keys + n, mask=n < keys, other=0) != 0)[None, :]
    masked = x
    if MASK is not None:
        at = MASK + b * mask_b + h * mask_h + m[:, None].to(tl.int64) * mask_c + n[None, :] * mask_s
        given = tl.load(at, mask=seen, other=0)
        if ADDITIVE:
            masked = x + given.to(tl.float32)
        else:
            seen = seen & (given != 0)
    return x, tl.where(seen, masked, -float("inf"))


@jit
def tile_scores(
    q, k, m, n, b, h, rows, keys, offset, window, scale, softcap,
    QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of rows and keys; see :func:`hide`."""
    return hide(
        tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale,
        m, n, b, h, rows, keys, offset, window, softcap,
        QSEG, KSEG, VALID, MASK, mask_b, mask_h, mask_c, mask_s,
        CAUSAL, WINDOW, SOFTCAP, ADDITIVE,
    )  # fmt: skip


@jit
def product(
    A, B, m, n, rows, keys, a_c, b_s,
    SIZE: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``A B^T`` of rows ``m`` and ``n``, which lie ``a_c`` and ``b_s`` apart."""
    x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a_at = A + m[:, None].to(tl.int64) * a_c
    b_at = B + n[:, None].to(tl.int64) * b_s
    for first in range(0, SIZE, PART):
        i = (first + tl.arange(0, PART))[None, :]
        a = tl.load(a_at + i, (m < rows)[:, None] & (i < SIZE), 0.0)
        b = tl.load(b_at + i, (n < keys)[:, None] & (i < SIZE), 0.0)
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
    return x
