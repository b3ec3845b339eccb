"""Measured memory and time: of live tensors, of a process, of a training run."""

from fxmem.measure.live import (
    MIB,
    HighWater,
    Timeline,
    available_bytes,
    parameter_bytes,
    peak_bytes,
    process_peak_bytes,
    release_unused,
    resident_bytes,
    return_freed_memory,
    track,
)

__all__ = [
    "MIB",
    "HighWater",
    "Timeline",
    "available_bytes",
    "parameter_bytes",
    "peak_bytes",
    "process_peak_bytes",
    "release_unused",
    "resident_bytes",
    "return_freed_memory",
    "track",
]
