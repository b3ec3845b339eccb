"""What a value is along the streamed axis; see :mod:`fxmem.streaming.labels`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fxmem.axes.signature import Cut
from fxmem.axes.sizes import CHUNKS

STATES = Cut(0, CHUNKS)
"""Of a state: one row per chunk."""


class Kind(Enum):
    STRAIGHT = "straight"
    FLEX = "flex"
    CUT = "cut"
    PARTIAL = "partial"


@dataclass(frozen=True, slots=True)
class Label:
    kind: Kind
    stage: int = 0
    cut: Cut | None = None
    suffix: bool = False
