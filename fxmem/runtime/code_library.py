"""Compiled regions, shared by all captures of the process.

A trace may have decided by a comparison of sizes (a slice up to 8 of ``T`` rows, a broadcast, an
index that became a number). Dynamo guards the capture at hand by it, and no other. So code is
shared by captures that were cut under the same assumptions, and what the code's own trace assumed
beyond them must hold for the sizes of the capture that takes it, and becomes its guard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import sympy

from fxmem.caches import Cache
from fxmem.frontend.regions import Region
from fxmem.runtime.region_code import RegionCode


class CodeLibrary:
    """Code by structural key; several where traces of one structure assumed different sizes."""

    def __init__(self) -> None:
        self._found: Cache[str, list[tuple[RegionCode, list[Any]]]] = Cache("region code", 1024)

    def __iter__(self) -> Iterator[RegionCode]:
        return (code for entries in self._found.values() for code, _ in entries)

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Empty meanwhile, and then as it was."""
        kept = dict(self._found)
        self._found.clear()
        try:
            yield
        finally:
            self._found.clear()
            self._found.update(kept)

    def take(self, key: str, region: Region, make: Callable[[str], RegionCode]) -> RegionCode:
        """Code of the region: what is there and serves its sizes, else ``make(name)``."""
        capture = region.capture
        key = f"{key} {capture.assumed}"
        entries = self._found[key] = self._found.pop(key, [])  # the last to go, now
        for code, guards in entries:
            if capture.assume(guards):
                return code
        code = make(f"region{sum(1 for _ in self)}")
        known = set(capture.assumed)
        new: list[sympy.Basic] = [g for g in capture.guards() if g not in known]
        entries.append((code, new))
        return code
