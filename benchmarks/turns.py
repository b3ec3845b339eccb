"""Processes that stay alive together and work one at a time, a step each.

Two processes measured one after the other meet different weather on a shared machine. By turns, the
steps that are compared lie seconds apart, while every setup still has a process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence


class Turns:
    """Who may work: the names in turn, until they are done.

    `take` is called from a thread per name. Progress messages of a job are the places where it
    stops and waits, so a turn is the work between two of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._waiting = list(names)
        self._changed = threading.Condition()

    def take(self, name: str) -> None:
        """Wait until it is the turn of ``name``."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == name)

    def pass_on(self, name: str) -> None:
        """End the turn of ``name``, and wait for its next one."""
        with self._changed:
            self._waiting.append(self._waiting.pop(0))
            self._changed.notify_all()
        self.take(name)

    def leave(self, name: str) -> None:
        """``name`` is done, or failed."""
        with self._changed:
            self._waiting.remove(name)
            self._changed.notify_all()
