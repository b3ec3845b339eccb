"""Compiled regions, shared by all captures of the process.

A trace may have decided by a comparison of sizes (a slice up to 8 of ``T`` rows, a broadcast, an
index that became a number). Dynamo guards the capture at hand by it, and no other. So code is
shared by captures that were cut under the same assumptions, and what the code's own trace assumed
beyond them must hold for the sizes of the capture that takes it, and becomes its guard.

What was traced and scheduled also goes to the disk, where the next process finds it
(:mod:`fxmem.frontend.saved_regions`).
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fxmem.caches import Cache
from fxmem.frontend.regions import Region
from fxmem.frontend.saved_regions import file_of, read, write
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.saved_code import Saved


@dataclass(slots=True)
class _Entry:
    """``file``: where its code is for other processes, which has ``written`` programs."""

    code: RegionCode
    file: Path | None
    written: int


class CodeLibrary:
    """Code by structural key; several where traces of one structure assumed different sizes."""

    def __init__(self) -> None:
        self._found: Cache[str, list[_Entry]] = Cache("region code", 1024)
        self._aside = False
        atexit.register(_save, weakref.ref(self))

    def __iter__(self) -> Iterator[RegionCode]:
        return (entry.code for entries in self._found.values() for entry in entries)

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Empty meanwhile, without what is on the disk, and then as it was."""
        kept, self._aside = dict(self._found), True
        self._found.clear()
        try:
            yield
        finally:
            self._aside = False
            self._found.clear()
            self._found.update(kept)

    def take(
        self, key: str, region: Region, make: Callable[[str, Saved | None], RegionCode], *,
        shared: bool = True,
    ) -> RegionCode:  # fmt: skip
        """Code of the region: what is there and serves its sizes, else ``make(name, saved)``.

        ``shared``: with other processes.
        """
        capture = region.capture
        name = f"{key} {region.key()} {capture.assumed}"
        entries = self._found[name] = self._found.pop(name, [])  # the last to go, now
        for entry in entries:
            if capture.assume(entry.code.stored.assumed):
                return entry.code
        file = file_of(region, key) if shared and not self._aside else None
        saved = read(file) if file is not None else None
        if not isinstance(saved, Saved) or not capture.assume(saved.assumed):
            saved = None
        code = make(f"region{sum(1 for _ in self)}", saved)
        written = 0 if saved is None else len(saved.programs)
        if saved is None:
            known = set(capture.assumed)
            code.stored.assumed = [g for g in capture.guards() if g not in known]
        entries.append(_Entry(code, file, written))
        return code

    def save(self) -> None:
        """Write what has new programs."""
        for entries in list(self._found.values()):
            for entry in entries:
                made = len(entry.code.stored.programs)
                if entry.file is not None and made > entry.written:
                    entry.written = made
                    write(entry.file, entry.code.stored)


def _save(library: weakref.ref[CodeLibrary]) -> None:
    if (found := library()) is not None:
        found.save()
