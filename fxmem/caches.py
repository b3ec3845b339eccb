"""Tables that live as long as the process: named, measured and emptied in one place.

What belongs to one object hangs on that object and dies with it. The tables here hold what models
share: code by structure, compiled segments, decisions about a device.
"""

from __future__ import annotations

import weakref
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

_TABLES: list[weakref.ref[Cache]] = []


class Cache(dict[K, V]):
    """A table with a name, which others may share. Over ``limit`` entries the one that was stored
    first goes.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        super().__init__()
        self.name, self.limit = name, limit
        _TABLES.append(weakref.ref(self, _TABLES.remove))

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while self.limit is not None and len(self) > self.limit:
            del self[next(iter(self))]


def _tables() -> list[Cache]:
    return [table for found in _TABLES if (table := found()) is not None]


def sizes() -> dict[str, int]:
    """Entries of all tables of the process, by name."""
    found: dict[str, int] = {}
    for table in sorted(_tables(), key=lambda t: t.name):
        found[table.name] = found.get(table.name, 0) + len(table)
    return found


def clear() -> None:
    """Empty every table. Models that are transformed keep the code they use; the next capture
    traces anew, or reads what is on the disk.
    """
    for table in _tables():
        table.clear()


__all__ = ["Cache", "clear", "sizes"]
