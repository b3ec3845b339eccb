"""Python's collector of cyclic garbage rests during a capture."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager


@contextlib.contextmanager
def resting(watch: Callable[[Callable[[], None]], AbstractContextManager[None]]) -> Iterator[None]:
    """From the start of a capture until the end of its call, garbage is not looked for: it would be
    among all live objects, again and again as Dynamo makes them, a sixth of a first step.

    ``watch(begin)`` is a context in which ``begin`` is called when a capture begins. Other calls
    leave the collector alone, so that what they drop in cycles does not stay.
    """
    paused = False

    def begin() -> None:
        nonlocal paused
        paused |= gc.isenabled()
        gc.disable()

    try:
        with watch(begin):
            yield
    finally:
        if paused:
            gc.enable()


__all__ = ["resting"]
