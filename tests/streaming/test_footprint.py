"""What a region measures by the sizes of a call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import fx

from fxmem.streaming.chunk_size import footprint


def test_a_region_without_the_axis_needs_no_length() -> None:
    nothing: Any = SimpleNamespace(
        tangents=[], graph=fx.Graph(), info={}, learned=set(), outputs=[], inputs=[]
    )
    found = footprint(nothing)
    assert found.batch({}) == 1
    assert found.per_token({}) == 0
