"""What was done so far in this process, for reports and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counter:
    """What was done so far: captures, traces of distinct regions, programs, chunk bodies run."""

    captures: int = 0
    traces: int = 0
    programs: int = 0
    bodies: int = 0
    trace_seconds: float = 0.0
    lower_seconds: float = 0.0
    capture_seconds: float = 0.0


COUNTER = Counter()
