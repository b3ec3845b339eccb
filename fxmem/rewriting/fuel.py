"""Fuel: how many rewrites may still happen, so that a wrong result can be brought down to one.

A rewrite that a program needs to be right takes none. All others ask in the order in which they
happen; ``FXMEM_FUEL=n`` in the environment grants the first ``n`` of the process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fxmem.errors import PlanError

NAME = "FXMEM_FUEL"


@dataclass(slots=True)
class Fuel:
    """``limit``: how many are granted, None for all; ``asked``: how many have asked."""

    limit: int | None = None
    asked: int = 0

    def take(self) -> bool:
        """Whether the next rewrite may happen."""
        self.asked += 1
        return self.limit is None or self.asked <= self.limit


_tanks = [Fuel()]


def fuel() -> Fuel:
    """What rewrites take from now.

    Raises:
        PlanError: ``FXMEM_FUEL`` is no number.
    """
    if len(_tanks) == 1:
        given = os.environ.get(NAME, "")
        if given and not given.isdigit():
            raise PlanError(f"{NAME} is {given!r}", advice="give a whole number")
        _tanks[0].limit = int(given) if given else None
    return _tanks[-1]


@contextlib.contextmanager
def fuelled(limit: int | None) -> Iterator[Fuel]:
    """Rewrites made meanwhile take from a tank of their own, whatever the environment says."""
    _tanks.append(Fuel(limit))
    try:
        yield _tanks[-1]
    finally:
        _tanks.pop()
