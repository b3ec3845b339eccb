"""Bytes alive over a step: every storage with the number of those that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Ledger:
    """Storages alive, by holder counts."""

    live: int = 0
    transient: int = 0
    position: int = -1
    timeline: list[tuple[str, int]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sizes: dict[Any, int] = field(default_factory=dict)
    holders: dict[Any, int] = field(default_factory=dict)

    def hold(self, storage: Any, size: int = 0) -> None:
        if storage not in self.holders:
            self.holders[storage], self.sizes[storage] = 0, size
            self.live += size
        self.holders[storage] += 1

    def release(self, storage: Any) -> None:
        self.holders[storage] -= 1
        if not self.holders[storage]:
            self.live -= self.sizes.pop(storage)
            del self.holders[storage]

    def mark(self, label: str, extra: int = 0) -> None:
        self.transient = max(self.transient, extra)
        self.timeline.append((label, self.live + extra))
        self.positions.append(self.position)
