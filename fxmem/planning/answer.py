"""What a forecast says."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxmem.plan.plan import Plan
from fxmem.planning.moments import Steps

PARTS = ("weights", "optimizer", "gradients", "saved", "working")


@dataclass(frozen=True, slots=True)
class Row:
    """One way to train.

    Attributes:
        method: ``"plain autograd"``, ``"checkpointing"``, ``"stream"`` or ``"stream + offload"``.
        optimizer: what trains.
        longest: tokens per sequence that fit the memory, within a hundredth; 0 where none does.
        bytes: peak of a step of the forecast's length, with weights and the optimizer's state.
        per_token: bytes that one more token of the sequence takes, about.
        away: of that step, bytes that wait on the host or the disk.
        seconds: of that step, about.
    """

    method: str
    optimizer: str
    longest: int
    bytes: int
    per_token: int
    away: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of one step of a rank, whatever the length and the chunks.

    Attributes:
        ranks: that share the parameters.
        gathers: of the parameters of one group each; every layer once per pass.
        gathered: bytes of what they make whole.
        reductions: of the gradients of one group each.
        reduced: bytes of the whole gradients.
    """

    ranks: int
    gathers: int
    gathered: int
    reductions: int
    reduced: int

    @property
    def received(self) -> int:
        """Bytes that come from other ranks: all but a rank's own part."""
        return (self.gathered + self.reduced) * (self.ranks - 1) // self.ranks

    def __str__(self) -> str:
        return (
            f"per step {self.gathers} gathers of {size(self.gathered)} in all and "
            f"{self.reductions} reductions of {size(self.reduced)}; "
            f"{size(self.received)} come from other ranks"
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The fields of :class:`fxmem.Forecast`."""

    model: str
    device: str
    memory: int
    length: int
    batch: int
    dtype: str
    rows: tuple[Row, ...]
    chosen: Row
    plan: Plan
    parts: dict[str, int]
    seconds: float
    keeps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    steps: Steps | None = field(default=None, repr=False, compare=False)
    traffic: Traffic | None = None


def size(count: float) -> str:
    """Bytes with three digits: ``"24 GB"``, ``"512 MB"``; powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= 0.9995 * scale:
            return (
                f"{count / scale:.3g} {unit}"
                if count < 999.5 * scale
                else f"{count / scale:,.0f} {unit}"
            )
    return f"{count / 1e3:.3g} kB"
