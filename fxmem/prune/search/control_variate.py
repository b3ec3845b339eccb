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


def fit(masks: Tensor, losses: Tensor, snapshot: Tensor) -> Tensor:
    """Ridge regression of losses on masks: float64 (n,), the loss that each kept unit adds.

    The strength of the ridge is the one of the least generalised cross-validation error (Golub,
    Heath and Wahba, 1979). Losses and masks are compared within one snapshot, whose masks saw the
    same batches.

    Args:
        masks: bool (N, n).
        losses: float64 (N,), finite.
        snapshot: int (N,), the snapshot of each row.
    """
    groups = torch.unique(snapshot, return_inverse=True)[1]
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
    """The latest masks with their losses, a row per mask, however many batches it has seen.

    Attributes:
        rows: most rows that are kept.
        masks: bool (N, n). losses: float64 (N,), mean over batches. snapshot: int (N,).
        sums: float64 (K,), losses of the present snapshot's masks, above the mean of their step.
        counts: int (K,), steps in `sums`.
    """

    def __init__(self, units: int, rows: int) -> None:
        self.rows = rows
        self.masks = torch.zeros(0, units, dtype=torch.bool)
        self.losses = torch.zeros(0, dtype=torch.float64)
        self.snapshot = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.int64)

    def note(self, losses: Tensor, alive: Tensor) -> None:
        """Losses of one step.

        Args:
            losses: float64 (m,), of the masks that `alive` selects.
            alive: bool (K,), masks whose loss was finite.
        """
        if len(self.sums) != len(alive):
            self.sums = torch.zeros(len(alive), dtype=torch.float64)
            self.counts = torch.zeros(len(alive), dtype=torch.int64)
        self.sums[alive] += losses - losses.mean()
        self.counts[alive] += 1

    def close(self, masks: Tensor, snapshot: int) -> None:
        """A row for every mask, bool (K, n), of a snapshot that is used up."""
        if len(self.sums):
            seen = self.counts > 0
            self.add(masks[seen], self.sums[seen] / self.counts[seen], snapshot)
        self.sums, self.counts = self.sums[:0], self.counts[:0]

    def add(self, masks: Tensor, losses: Tensor, snapshot: int) -> None:
        """Append one snapshot's finite losses."""
        at = torch.full((len(losses),), snapshot)
        self.masks = torch.cat([self.masks, masks])[-self.rows :]
        self.losses = torch.cat([self.losses, losses])[-self.rows :]
        self.snapshot = torch.cat([self.snapshot, at])[-self.rows :]

    def fit(self) -> Tensor:
        """The control variate of these rows; zero where they are too few."""
        if len(self.losses) < 2 or not int(self.snapshot.unique().numel()) < len(self.losses):
            return torch.zeros(self.masks.shape[1], dtype=torch.float64)
        return fit(self.masks, self.losses, self.snapshot)

    def state(self) -> list[Tensor]:
        """What `load` needs."""
        return [self.masks, self.losses, self.snapshot, self.sums, self.counts]

    def load(self, state: list[Tensor]) -> None:
        """The rows of `state`."""
        rows = (x.clone() for x in state)
        self.masks, self.losses, self.snapshot, self.sums, self.counts = rows
