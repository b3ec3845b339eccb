"""What compiling chunk bodies cost in this process, and the bar that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress

from fxmem._compat import inductor as _compat_inductor


@dataclass(slots=True)
class CompileStats:
    """What bodies were compiled for: their segments, those that share code with another one, those
    given to Inductor, and those of them that its cache on disk held.
    """

    bodies: int = 0
    segments: int = 0
    shared: int = 0
    compiled: int = 0
    cached: int = 0
    eager_calls: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)


STATS = CompileStats()


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's standard error while a body compiles."""
    before = _compat_inductor.cache_counters()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"compiling {label}", total=total)
        yield lambda: bar.advance(task)
    hits, _ = _compat_inductor.cache_counters()
    STATS.segments += total
    STATS.cached += hits - before[0]
