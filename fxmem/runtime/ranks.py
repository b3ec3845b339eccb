"""The interface between programs and ranks that stream parts of one sequence together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from fxmem.axes.signature import Cut
from fxmem.axes.sizes import evaluate

Kind = Literal["gather", "scatter", "sum", "rows"]


@dataclass(frozen=True, slots=True)
class Placed:
    """A cut of this call: dimension ``dim`` holds ``outer x rows x inner`` elements."""

    dim: int
    outer: int = 1
    inner: int = 1

    @classmethod
    def of(cls, cut: Cut, sizes: Mapping[str, int]) -> Placed:
        """With the sizes of a call."""
        return cls(cut.dim, evaluate(cut.outer, sizes), evaluate(cut.inner, sizes))


class Ranks(Protocol):
    """The ranks that stream one call; seen from one of them."""

    rows: int
    """How many rows of the sequence this rank has."""

    def chunks(self, chunk: int) -> list[tuple[int, ...]]:
        """``(lo, hi, at)`` of each of its chunks: bounds in the sequence, and the first among its
        own rows."""

    def exchange(
        self, kind: Kind, tensors: list[Tensor], cuts: Sequence[Placed | None],
        shapes: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:  # fmt: skip
        """See :class:`fxmem.program.steps.Exchange`; sums to be scattered leave ``tensors``."""
