"""Losses far above those of the other masks, cut to a ceiling.

A mask that lost one unit the model cannot do without has a loss many spreads above the others; its
score would push all the units it happens to lack. With a ceiling the search minimises the expected
loss below it (winsorising: Huber, Robust Statistics). The ceiling of a sample comes from the other
samples and from past steps alone, so the gradient of what is then minimised stays unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMAL = 1.4826
"""Standard deviation of a normal law over its median absolute deviation."""


def ceilings(losses: Tensor, width: float) -> Tensor:
    """Per sample, the median of the other samples' losses plus ``width``: (K,), K >= 2."""
    count = len(losses)
    others = losses.expand(count, count)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    return others.quantile(0.5, dim=1) + width


def against_others(losses: Tensor, known: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Cut losses less their control variate, and each sample's baseline: both (K,), K >= 2.

    The baseline is the mean of the other samples' losses, cut at this sample's ceiling and less
    their control variates: like the ceiling it does not know the sample's own mask.

    Args:
        losses: float64 (K,).
        known: float64 (K,), control variate of each sample.
        width: of the ceiling above the others' median.
    """
    ceiling = ceilings(losses, width)
    rest = torch.minimum(losses, ceiling) - known
    everyone = torch.minimum(losses, ceiling[:, None]) - known
    return rest, (everyone.sum(1) - rest) / (len(losses) - 1)


def robust_variance(losses: Tensor) -> float:
    """Variance of a normal law with the losses' median absolute deviation; theirs where that is 0.

    Args:
        losses: float64 (K,), K >= 2.
    """
    middle = losses.quantile(0.5)
    spread = NORMAL * float((losses - middle).abs().quantile(0.5))
    return spread**2 if spread > 0 else float(losses.var())
