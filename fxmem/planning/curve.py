"""Bytes of a step as a function of its length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fxmem.planning.moments import Steps

SAMPLES = (6144, 8192, 10240)
"""Lengths at which a step is replayed: longer than usual windows of attention, and short enough
for masks that a model makes from its token ids."""
LONGEST = 1 << 24
"""Tokens; no plan looks further."""
CLOSE = 1 / 128
"""A longest length is found up to this part of it."""


class Curve:
    """A replayed step at any length, from two or three of them.

    Every tensor's bytes are a polynomial in the length, of the second degree where a tensor has
    two axes of it, so each moment's are too.
    """

    def __init__(self, replay: Callable[[int], Steps]) -> None:
        """``replay``: the step at a length."""
        first, second = (replay(t) for t in SAMPLES[:2])
        found = [first, second]
        if len(first) != len(second):
            # loops over the length: only the peaks can be compared
            found = [Steps(np.array([f.largest], np.int64)) for f in found]
        elif second.widens(first, SAMPLES[1] / SAMPLES[0]):
            found.append(replay(SAMPLES[2]))
        powers = np.vander(np.array(SAMPLES[: len(found)], float), increasing=True)
        values = np.stack([f.bytes.reshape(-1) for f in found])
        self._factors = np.linalg.solve(powers, values)

    def at(self, length: int) -> Steps:
        """The moments of a step of this length."""
        powers = float(length) ** np.arange(len(self._factors))
        return Steps(np.rint(powers @ self._factors).reshape(-1, 3).astype(np.int64))


def longest(bytes_at: Callable[[int], int], limit: int, most: int = LONGEST) -> int:
    """The longest length whose step stays within ``limit`` bytes, up to :data:`CLOSE`; 0 if none
    does. Bytes never fall with the length and are nearly a line in it, so that a line through two
    lengths points at the third; where it does not, the gap is halved.
    """
    low, high = 0, most
    asked: list[tuple[int, int]] = []
    guess = 2048
    while high - low > max(1, int(low * CLOSE)):
        found = bytes_at(guess)
        asked.append((guess, found))
        if found <= limit:
            low = guess
        else:
            high = guess
        guess = min(high - 1, max(low + 1, _next(asked, low, high, limit)))
    return low


def _next(asked: list[tuple[int, int]], low: int, high: int, limit: int) -> int:
    if len(asked) == 1:
        return 8 * low if low else high // 8
    if len(asked) % 4 == 0:
        return (low + high) // 2
    (a, at_a), (b, at_b) = sorted(asked, key=lambda one: abs(one[1] - limit))[:2]
    if at_a == at_b:
        return (low + high) // 2
    aim = a + (limit - at_a) * (b - a) / (at_b - at_a)
    # beside the aim, on the side where nothing is known yet, so that the gap closes around it
    return int(aim * (1 - CLOSE / 3) if aim - low > high - aim else aim * (1 + CLOSE / 3))
