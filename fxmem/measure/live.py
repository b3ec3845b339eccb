"""Measured memory: live tensor bytes over time, and the process's own high-water mark.

Two instruments that must agree. :func:`track` sums every allocator event of one call, so it sees
temporaries inside operators and draws a curve; :class:`HighWater` asks the operating system, so it
also sees what the allocator does not (Python objects, code, fragmentation). All sizes are bytes,
all times seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fxmem._compat.measure import memory_events

MIB = 2**20


@dataclass(frozen=True)
class Timeline:
    """Live bytes over time, relative to the start of the call.

    Attributes:
        times: seconds since the first event; ascending.
        live: bytes allocated since the start and not yet freed, after each event. On a CPU, torch
            does not record that a call frees what was there before; a GPU's curve goes below 0.
        peak: largest value of ``live``, at least 0; kept exact by :meth:`downsample`.
    """

    times: tuple[float, ...]
    live: tuple[int, ...]
    peak: int

    @staticmethod
    def from_events(events: Iterable[tuple[int, int]]) -> Timeline:
        """Build from (nanoseconds, signed bytes) pairs in any order."""
        ordered = sorted(events, key=lambda event: event[0])
        total, live = 0, []
        for _, size in ordered:
            total += size
            live.append(total)
        times = tuple((at - ordered[0][0]) / 1e9 for at, _ in ordered)
        return Timeline(times, tuple(live), max(0, *live) if live else 0)

    def downsample(self, points: int) -> Timeline:
        """At most about ``points`` samples: the lowest and the highest of each stretch of time."""
        if len(self.times) <= points:
            return self
        width = self.times[-1] / max(1, points // 2) or 1.0
        buckets: dict[int, list[int]] = {}
        for index, at in enumerate(self.times):
            buckets.setdefault(int(at / width), []).append(index)
        kept: set[int] = {0, len(self.times) - 1}
        for members in buckets.values():
            kept.add(min(members, key=self.live.__getitem__))
            kept.add(max(members, key=self.live.__getitem__))
        chosen = sorted(kept)
        times = tuple(self.times[i] for i in chosen)
        return Timeline(times, tuple(self.live[i] for i in chosen), self.peak)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "times": [round(at, 6) for at in self.times],
            "live": list(self.live),
            "peak": self.peak,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Timeline:
        """Inverse of :meth:`to_dict`."""
        return Timeline(tuple(data["times"]), tuple(data["live"]), int(data["peak"]))


def track(fn: Callable[[], object], device: str | torch.device = "cpu") -> Timeline:
    """Run ``fn`` once and record every allocation and free of ``device``'s allocator.

    The recording itself keeps a few hundred bytes per operator of host memory outside the
    allocator, so do not read :class:`HighWater` around it.
    """
    kind = torch.device(device).type
    activities = [ProfilerActivity.CPU]
    if kind == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    # Without acc_events: the profile's own list of events, which nobody reads, is not made. That
    # takes minutes where many operators allocate inside few others.
    with profile(activities=activities, profile_memory=True) as recorded:
        fn()
        if kind == "cuda":
            torch.cuda.synchronize(device)
    return Timeline.from_events(
        (at, size) for at, size, where in memory_events(recorded) if where == kind
    )


def peak_bytes(fn: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Peak allocated bytes while ``fn`` runs, above what was allocated when it started.

    On a GPU this reads the allocator's own counters, which costs nothing; elsewhere it records.
    """
    if torch.device(device).type != "cuda":
        return track(fn, device).peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


class HighWater:
    """Resident high-water mark of this process, in bytes.

    :meth:`reset` starts a new span and works on Linux alone; elsewhere :attr:`resettable` is false
    and :attr:`peak` is the mark of the process's whole life.
    """

    def __init__(self) -> None:
        self.whole = process_peak_bytes()
        self.resettable = _clear_high_water()

    def reset(self) -> None:
        """Return unused heap to the system and start a new span."""
        self.whole = max(self.whole, process_peak_bytes())
        release_unused()
        self.resettable = _clear_high_water()

    @property
    def peak(self) -> int:
        """High-water mark since the last :meth:`reset`."""
        return process_peak_bytes()

    @property
    def lifetime(self) -> int:
        """High-water mark since the first sight of the process, spans before a reset included."""
        return max(self.whole, process_peak_bytes())


def process_peak_bytes() -> int:
    """Resident high-water mark of this process; since :func:`HighWater.reset` where that works."""
    mark = _proc_status("VmHWM")
    if mark is not None:
        return mark
    try:
        import resource
    except ImportError:
        return _psutil_peak()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident bytes of this process now; 0 where the system does not say."""
    return _proc_status("VmRSS") or 0


def release_unused() -> None:
    """Collect garbage and give free heap pages back to the system, where it can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_memory() -> None:
    """Make glibc give freed tensors back to the system at once, for the rest of the process.

    The resident peak is then the live peak and not an accident of fragmentation; every large tensor
    is mapped anew, which costs time. Does nothing with another C library.
    """
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, see mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 16)
        libc.mallopt(-1, 0)


def available_bytes() -> int | None:
    """Memory that a new process can use without swapping, or None where the system does not say.

    Counts the limit of the control group, which the kernel's own figure leaves out.
    """
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        left = max(0, limit - used)
        free = left if free is None else min(free, left)
    return free


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _clear_high_water() -> bool:
    try:
        # 5 resets the peak resident set size, see proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _proc_status(field: str) -> int | None:
    return _field(Path("/proc/self/status"), field)


def _field(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return None


def _psutil_peak() -> int:
    try:
        import psutil
    except ImportError:
        return 0
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))
