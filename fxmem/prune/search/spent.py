"""What a search spends, counted as it goes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counts:
    """What a search spent.

    Attributes:
        instantiations: snapshots whose sub-models were built.
        submodels: sub-models built, all ranks together.
        size: part of the prunable cost that each of them kept, summed.
        forwards: losses measured, all ranks together.
        used: losses that entered an update; an early refresh wastes some of a table.
        skipped: steps without a finite loss.
        ess: smallest effective sample fraction at each refresh.
        clipped: fraction of ratios that the clip changed, per step.
        cut: losses above their ceiling; see `fxmem.prune.search.outliers`.
        losses: mean loss per step.
        cap: largest log second moment reached after a step.
        building: seconds in which this rank built sub-models.
        running: seconds in which this rank measured losses.
    """

    instantiations: int = 0
    submodels: int = 0
    size: float = 0.0
    forwards: int = 0
    used: int = 0
    skipped: int = 0
    cut: int = 0
    ess: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    cap: float = 0.0
    building: float = 0.0
    running: float = 0.0
