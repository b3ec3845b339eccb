"""Gradients of the expected loss, measured on outdated sub-models and re-weighted.

A mask m keeps unit i with probability s_i. Masks drawn at a snapshot s0 serve while s moves on:
each measured loss is weighted by the likelihood ratio of its mask, ``p_s(m) / p_s0(m)``. This is a
formulation consistent with the abstract of "Computation and Memory-Efficient Model Compression with
Gradient Reweighting" (NeurIPS 2025), of which the method itself is not published with it; the mask
law and the score come from the policy-gradient pruner of arXiv 2406.10576.

Everything is float64 on the CPU: log ratios of 1e5 units lose their digits in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scope_blocks(layer: Tensor, scope: str) -> Tensor:
    """The partition whose ratios multiply: int (n,), numbered from 0.

    ``full`` is one block: unbiased for the loss at s. ``layer`` takes the units of one decoder
    layer: exactly the derivative at the point that is s in that layer and the snapshot elsewhere.
    ``none`` has every unit alone, where the ratio cancels and the stale score at s0 is left.
    """
    if scope == "full":
        return torch.zeros_like(layer)
    if scope == "none":
        return torch.arange(len(layer))
    return torch.unique(layer, return_inverse=True)[1]


def variance(s: Tensor) -> Tensor:
    """Variance of each unit's mask, ``s (1 - s)``."""
    return s * (1 - s)


def _over(value: Tensor, h: Tensor) -> Tensor:
    """value / h; 0 where a mask has no variance, for there it carries no information."""
    return torch.where(h > 0, value / h, 0.0)


def log_ratio(masks: Tensor, s: Tensor, s0: Tensor, block: Tensor) -> Tensor:
    """Log likelihood ratio of every mask in every block: float64 (K, blocks).

    Args:
        masks: bool (K, n).
        s: probabilities now, float64 (n,), inside (0, 1).
        s0: probabilities the masks were drawn from, likewise.
        block: int (n,) from `scope_blocks`.
    """
    kept = torch.log(s) - torch.log(s0)
    gone = torch.log1p(-s) - torch.log1p(-s0)
    terms = torch.where(masks, kept, gone)
    count = int(block.max()) + 1 if len(block) else 0
    return torch.zeros(len(masks), count, dtype=s.dtype).index_add_(1, block, terms)


def weights(logs: Tensor, clip: float) -> Tensor:
    """Ratios from their logarithms, limited to [1 / clip, clip]; `clip` may be infinite."""
    limit = math.log(clip) if math.isfinite(clip) else math.inf
    return torch.exp(logs.clamp(-limit, limit))


def clipped_fraction(logs: Tensor, clip: float) -> float:
    """The part of the ratios that `clip` changes, 0 to 1."""
    return float((logs.abs() > math.log(clip)).double().mean()) if math.isfinite(clip) else 0.0


def leave_one_out(losses: Tensor) -> Tensor:
    """Each sample's baseline, the mean of the other samples' losses: (K,), K >= 2."""
    return (losses.sum() - losses) / (len(losses) - 1)


def gradient(
    masks: Tensor,
    losses: Tensor,
    baseline: Tensor,
    s: Tensor,
    s0: Tensor,
    block: Tensor,
    *,
    clip: float = math.inf,
    alpha: float = 0.0,
) -> Tensor:
    """Estimated derivative of the expected loss by every probability: float64 (n,).

    ``mean_k R_k (loss_k - baseline_k) h^alpha (m_k - s) / h`` with h the mask variance.

    Args:
        masks: bool (K, n), drawn at `s0`.
        losses: float64 (K,), all of one batch, finite.
        baseline: float64 (K,) or a scalar; may not depend on its own sample's mask.
        s: probabilities now (n,), inside (0, 1).
        s0: probabilities at the draw (n,).
        block: int (n,), which ratios multiply; see `scope_blocks`.
        clip: ratios are limited to [1 / clip, clip]; biased where it bites.
        alpha: exponent of the diagonal preconditioner h^alpha. At 1/2 every score has variance 1,
            at 1 this is the natural gradient, at 0 the plain one.
    """
    advantage = losses - baseline
    if int(block.max()) + 1 == len(s):
        # A unit's own ratio times its score at s is the score at s0, whatever s is. Written so,
        # nothing is left for the clip to bias, and the masks need no ratio at all.
        scale = _over(variance(s) ** alpha, variance(s0))
        return (advantage @ (masks.to(s.dtype) - s0)) * scale / len(losses)
    scale = _over(variance(s) ** alpha, variance(s))
    ratio = weights(log_ratio(masks, s, s0, block), clip) * advantage[:, None]
    total = torch.zeros_like(s)
    for mask, row in zip(masks, ratio, strict=True):
        total += row[block] * (mask.to(s.dtype) - s)
    return total * scale / len(losses)


def log_second_moment(s: Tensor, s0: Tensor, block: Tensor) -> Tensor:
    """``log E[ratio^2]`` under the snapshot, per block; the inverse of its exp is the ESS."""
    terms = torch.log1p(_over((s - s0) ** 2, variance(s0)))
    return torch.zeros(int(block.max()) + 1, dtype=s.dtype).index_add_(0, block, terms)


def effective_fraction(s: Tensor, s0: Tensor, block: Tensor) -> float:
    """Smallest effective sample size of any block, as a fraction of the samples, 0 to 1."""
    return float(torch.exp(-log_second_moment(s, s0, block)).min())


def _block_sum(values: Tensor, block: Tensor) -> Tensor:
    return torch.zeros(int(block.max()) + 1, dtype=values.dtype).index_add_(0, block, values)


def trust(delta: Tensor, s: Tensor, block: Tensor, cap: float) -> float:
    """Scale in (0, 1] at which one step keeps every block's log second moment below `cap`."""
    growth = float(_block_sum(_over(delta**2, variance(s)), block).max())
    return 1.0 if growth <= cap else math.sqrt(cap / growth)
