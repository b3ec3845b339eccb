"""How many rows a chunk needs until longer ones are hardly faster: measured once per device.

Short chunks starve matrix products, read and write the gradients of weights more often, and launch
more kernels; long ones leave the caches. Where this turns depends on the device and the type, and
little on the width of the model (``python -m benchmarks.chunks`` measures both).
"""

from __future__ import annotations

import functools
import statistics
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from fxmem.measure.remembered import remembered
from fxmem.measure.undisturbed import timed

ROWS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
WITHIN = 1.05
"""The knee is the fewest rows whose time per row is within this of the best."""
NOMINAL = {"cpu": 384}
NOMINAL_DEVICE = 2048
"""Where nothing can be measured."""
WIDTH, INNER = 512, 2048
STEADY = 1.2
"""How far two of four times of one chunk may be apart, at the median over lengths. A machine that
does other work shows whose chunks met it, not which are fast."""
ALONE = 0.5
"""Part of the times of a round in which nobody else may have had the processor."""
ROUNDS = 4
LIMIT = 3.0
"""Seconds after which no further round begins; four take about one where nothing else runs."""
PATIENCE = 0.5
"""Seconds for one chunk, after which longer ones are not tried."""


def knee(device: torch.device, dtype: torch.dtype) -> int:
    """Rows per chunk for this device and type of weights."""
    return _knee(device, dtype, torch.get_num_threads())


@functools.cache
def _knee(device: torch.device, dtype: torch.dtype, threads: int) -> int:
    nominal = NOMINAL.get(device.type, NOMINAL_DEVICE)
    if device.type == "meta" or not torch.get_device_module(device).is_available():
        return nominal
    detail = str(dtype).removeprefix("torch.")
    found = remembered("rows", device, detail, lambda: measure(device, dtype))
    return int(found[0]) if found else nominal


def measure(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Time a small layer, forward and backward, in chunks of growing length; the knee, or nothing
    where the type has no products or the machine is busy.
    """
    found: list[float] = []

    def work() -> None:
        with suppress(RuntimeError):
            times = _times(device, dtype)
            if is_steady(times):
                found.append(of_curve({rows: min(t) / rows for rows, t in times.items()}))

    # modes of PyTorch, such as fake tensors or a watch of storages, belong to the caller's thread
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def is_steady(times: Mapping[int, Sequence[float]]) -> bool:
    """The two fastest times of a chunk are about equal."""
    pairs = [sorted(found)[:2] for found in times.values() if len(found) > 1]
    return bool(pairs) and statistics.median(slow / fast for fast, slow in pairs) <= STEADY


def of_curve(curve: dict[int, float]) -> int:
    """The knee of seconds per row by rows."""
    best = min(curve.values())
    return min(rows for rows, seconds in curve.items() if seconds <= WITHIN * best)


@torch.no_grad()
def _times(device: torch.device, dtype: torch.dtype) -> dict[int, list[float]]:
    """Seconds by rows; rounds take turns, so that other load meets all lengths. Nothing where other
    work had a part of the processor: with several threads it makes short chunks look slow.
    """
    weights = [torch.ones(WIDTH, INNER, device=device, dtype=dtype) / WIDTH for _ in range(4)]
    longest = ROWS[-1]
    states = torch.ones(longest, WIDTH, device=device, dtype=dtype)
    times: dict[int, list[float]] = {}
    lengths, total = list(ROWS), 0.0
    for _ in range(ROUNDS):
        undisturbed: list[bool] = []
        for rows in list(lengths):
            spent, alone = timed(partial(_layer, states[:rows], *weights), device)
            times.setdefault(rows, []).append(spent)
            undisturbed.append(alone)
            total += spent
            if spent > PATIENCE:
                lengths = lengths[: lengths.index(rows)]
                break
        if sum(undisturbed) < ALONE * len(undisturbed):
            return {}
        if total > LIMIT:
            break
    return times


def _layer(x: Tensor, up: Tensor, down: Tensor, up_grad: Tensor, down_grad: Tensor) -> None:
    """A layer and its backward, with as many small operators as a decoder layer's has."""
    scale = x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    normed = x * scale
    wide = normed @ up
    gate = wide.sigmoid()
    active = wide * gate
    out = active @ down.T + x
    d_active = out @ down
    down_grad.addmm_(out.T, active)
    d_wide = d_active * (gate + active * (1 - gate))
    up_grad.addmm_(normed.T, d_wide)
    d_normed = d_wide @ up.T
    (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True)).mul_(scale).add_(out)


__all__ = ["knee"]
