"""A linear control variate: what past masks tell about single units, taken out of the noise.

The score of one unit is multiplied by the whole loss, so every unit carries the noise of all. Where
``w . m`` predicts the losses, only the rest of a loss is noise: the estimator runs on
``loss_k - w . (m_k - s0)``, and the expectation of what was taken away, ``w_i`` for every unit,
is added back (control variates: Owen, Monte Carlo theory, methods and examples, section 8.9; for
scores: arXiv 1711.00123). Unbiased for every w that does not depend on the masks it is used with,
so w comes from masks of earlier snapshots alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = 10.0 ** torch.arange(-3, 3, 0.5, dtype=torch.float64)


def fit(masks: Tensor, losses: Tensor, step: Tensor) -> Tensor:
    """Ridge regression of losses on masks: float64 (n,), the loss that each kept unit adds.

    The strength of the ridge is the one of the least generalised cross-validation error (Golub,
    Heath and Wahba, 1979). Losses and masks are compared within one step, which shares its batch.

    Args:
        masks: bool (N, n).
        losses: float64 (N,), finite.
        step: int (N,), the step of each row.
    """
    groups = torch.unique(step, return_inverse=True)[1]
    x, y = _centred(masks.double(), groups), _centred(losses[:, None], groups)[:, 0]
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    real = values > 1e-10 * values[-1]
    values, vectors = values[real], vectors[:, real]
    # Part of the losses along each left singular vector of x, and what lies along none.
    seen = vectors.T @ y if wide else (vectors.T @ (x.T @ y)) / values.sqrt()
    beyond = (y @ y - seen @ seen).clamp_min(0)
    free = len(y) - int(groups.max()) - 1
    best, error = torch.zeros(x.shape[1], dtype=x.dtype), float(y @ y) / max(1, free) ** 2
    for ridge in RIDGES * (values.sum() / max(1, free)):
        shrink = values / (values + ridge)
        left = free - float(shrink.sum())
        if left <= 0:
            continue
        found = float(((1 - shrink) * seen).square().sum() + beyond) / left**2
        if found < error:
            error = found
            if wide:
                best = x.T @ (vectors @ (seen / (values + ridge)))
            else:
                best = vectors @ (seen * values.sqrt() / (values + ridge))
    return best


def _centred(x: Tensor, groups: Tensor) -> Tensor:
    count = torch.bincount(groups).double()[:, None]
    mean = torch.zeros(len(count), x.shape[1], dtype=x.dtype).index_add_(0, groups, x) / count
    return x - mean[groups]


class History:
    """The latest losses with their masks.

    Attributes:
        rows: most rows that are kept.
        masks: bool (N, n). losses: float64 (N,). step: int (N,).
    """

    def __init__(self, units: int, rows: int) -> None:
        self.rows = rows
        self.masks = torch.zeros(0, units, dtype=torch.bool)
        self.losses = torch.zeros(0, dtype=torch.float64)
        self.step = torch.zeros(0, dtype=torch.int64)

    def add(self, masks: Tensor, losses: Tensor, step: int) -> None:
        """Append one step's finite losses."""
        at = torch.full((len(losses),), step)
        self.masks = torch.cat([self.masks, masks])[-self.rows :]
        self.losses = torch.cat([self.losses, losses])[-self.rows :]
        self.step = torch.cat([self.step, at])[-self.rows :]

    def fit(self) -> Tensor:
        """The control variate of these rows; zero where they are too few."""
        if len(self.losses) < 2 or not int(self.step.unique().numel()) < len(self.losses):
            return torch.zeros(self.masks.shape[1], dtype=torch.float64)
        return fit(self.masks, self.losses, self.step)

    def state(self) -> list[Tensor]:
        """What `load` needs."""
        return [self.masks, self.losses, self.step]

    def load(self, state: list[Tensor]) -> None:
        """The rows of `state`."""
        self.masks, self.losses, self.step = (x.clone() for x in state)
