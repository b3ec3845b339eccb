"""Seconds of a piece of work, and whether this process had the processor meanwhile.

On a machine that does other work, threads wait for one that does not run: short pieces then look
slower than they are, more so the more threads there are. Wall-clock times alone can be steady all
the same; the processor time beside them tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SHARE = 0.85
"""Processor time that a piece must have had, as a part of wall-clock time times threads."""


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, bool]:
    """Seconds, and whether nobody else used the processor; of another device this is not known and
    taken for granted."""
    _wait(device)
    start, used = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    alone = device.type != "cpu" or used >= SHARE * seconds * torch.get_num_threads()
    return seconds, alone


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


__all__ = ["timed"]
