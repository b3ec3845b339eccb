"""A line on a terminal's standard error that says what is done while a first step takes long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.status import Status

AFTER = 2.0
"""Seconds before it is shown."""
_LOCAL = threading.local()


class Line:
    """One line; :meth:`begin` may be called from the watch of :func:`reported` only."""

    def __init__(self, console: Console) -> None:
        self._status = Status("fxmem: capturing the model", console=console)
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """Something that may take long begins."""
        if self._timer is None:
            self._timer = threading.Timer(AFTER, self._status.start)
            self._timer.daemon = True
            self._timer.start()

    def says(self, text: str) -> None:
        self._status.update(f"fxmem: {text}")

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._status.stop()


@contextlib.contextmanager
def reported(watch: Callable[[Callable[[], None]], AbstractContextManager[None]]) -> Iterator[None]:
    """Show the line inside where it is a terminal's; ``watch(begin)`` is a context in which
    ``begin`` is called when something that may take long begins.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    before, line = getattr(_LOCAL, "line", None), Line(console)
    _LOCAL.line = line
    try:
        with watch(line.begin):
            yield
    finally:
        line.end()
        _LOCAL.line = before


def doing(text: str) -> None:
    """Name what is done now, by this thread, in the line where there is one."""
    if (line := getattr(_LOCAL, "line", None)) is not None:
        line.says(text)
