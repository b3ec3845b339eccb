"""The gradient of a tile of logits, which the backward kernels of the LM head share.

Letters as in :mod:`linear_nll`. With p the softmax and H the entropy, the gradient of the logits of
a token is

    dz = p (B + C (z - lse)) + M + sum_k A_k onehot(target_k),
    A = dlogp, B = dlse - sum_k dlogp_k - dentropy H, C = -dentropy, M = dmean / V,

four numbers per token; then the temperature and the softcap by the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._triton import dot_precision, jit, tl
from fxmem.kernels.layout import rows_last
from fxmem.kernels.linear_nll import tile_logits


def coefficients(
    target: Tensor,
    entropy: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    dmean: Tensor | None,
    vocabulary: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """``A [N, K]`` and ``(B, C, M) [3, N]``; where, not times zero: a mean over no token is inf."""
    ignored = target == ignore_index
    dead = ignored.all(1)
    zero = torch.zeros_like(entropy)

    def kept(x: Tensor | None) -> Tensor:
        return zero if x is None else x.to(zero.dtype).masked_fill(dead, 0)

    a = zero[:, None].expand(target.shape) if dlogp is None else dlogp.to(zero.dtype)
    a = a.masked_fill(ignored, 0)
    dh, dl, dm = kept(dentropy), kept(dlse), kept(dmean)
    return a.contiguous(), torch.stack([dl - a.sum(1) - dh * entropy, -dh, dm / vocabulary])


@jit
def tile_gradient(
    H, W, BIAS, TARGET, A, BCM, LSE, n, v, rows, vocabulary, h_n, w_v, softcap, inverse_temperature,
    K: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of ``h W^T + bias``; 0 outside the matrix."""
    row = n < rows
    z = tile_logits(
        H, W, BIAS, n, v, rows, vocabulary, h_n, w_v, softcap, inverse_temperature,
        D, SOFTCAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    log_p = z * inverse_temperature - tl.load(LSE + n, mask=row, other=0.0)[:, None]
    b = tl.load(BCM + n, mask=row, other=0.0)[:, None]
    c = tl.load(BCM + rows + n, mask=row, other=0.0)[:, None]
    m = tl.load(BCM + 2 * rows + n, mask=row, other=0.0)[:, None]
    dz = tl.exp(log_p) * (b + c * log_p) + m
    for j in range(K):
        target = tl.load(TARGET + n.to(tl.int64) * K + j, mask=row, other=-1)
        a = tl.load(A + n.to(tl.int64) * K + j, mask=row, other=0.0)
        dz += tl.where(target[:, None] == v[None, :], a[:, None], 0.0)
    dz = dz * inverse_temperature
    if SOFTCAP:
        dz = dz * (1 - (z / softcap) * (z / softcap))
    return tl.where(row[:, None] & (v < vocabulary)[None, :], dz, 0.0)


def tile_arguments(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, entropy: Tensor, lse: Tensor,
    gradients: Sequence[Tensor | None], ignore_index: int, softcap: float, temperature: float,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of :func:`tile_gradient`, but for the end of the vocabulary."""
    h, weight, target = rows_last(h), rows_last(weight), target.contiguous()
    dlogp, dentropy, dlse, dmean = gradients
    a, bcm = coefficients(
        target, entropy, dlogp, dentropy, dlse, dmean, weight.shape[0], ignore_index
    )
    return {
        "H": h, "W": weight, "BIAS": bias, "TARGET": target, "A": a, "BCM": bcm, "LSE": lse,
        "rows": h.shape[0], "h_n": h.stride(0), "w_v": weight.stride(0), "softcap": float(softcap),
        "inverse_temperature": 1.0 / temperature, "K": target.shape[1], "D": h.shape[1],
        "SOFTCAP": softcap > 0, "PRECISION": dot_precision(h.dtype),
    }  # fmt: skip
