"""What a device has free, what optimizers hold, and how fast it is."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fxmem.measure.remembered import remembered
from fxmem.runtime.offload import Disk
from fxmem.streaming.costs import Rates

SHARE = 0.9
"""Of what is free, the part that ``memory="auto"`` takes."""
GPU = Rates(flops=100e12, bytes=1e12)
LINK = 2e10
"""Bytes per second between a GPU and pinned memory; PCIe 4 and better."""
_CGROUP = Path("/sys/fs/cgroup")
_OPTIMIZERS: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device does in a second; ``transfer``: bytes to and from each home of offloaded
    tensors.
    """

    compute: Rates
    transfer: dict[str, float]


@functools.cache
def rates(device: torch.device) -> DeviceRates:
    """Measured in about a second on a CPU, once per machine; nominal on a GPU, whose ratio of
    operations to bytes is all that a choice depends on."""
    if device.type != "cpu":
        return DeviceRates(GPU, {"cpu": LINK, "disk": 1e9})
    flops, moved, disk = remembered("rates", device, "float32", _measure)
    return DeviceRates(Rates(flops, moved), {"disk": disk})


def _measure() -> tuple[float, float, float]:
    """Operations per second, and bytes per second in memory and to and from the disk."""
    a = torch.rand(384, 768)
    b = torch.rand(768, 2048)
    flops = 2 * 384 * 768 * 2048 / _fastest(lambda: a @ b)
    wide = torch.rand(1 << 23)
    out = torch.empty_like(wide)
    moved = 3 * wide.nbytes / _fastest(lambda: torch.add(wide, wide, out=out))
    return flops, moved, _disk_rate()


def _fastest(run: Any, times: int = 5) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _disk_rate() -> float:
    """Of writing 16 MiB and reading them, in a file like that of offloaded tensors."""
    disk, tensor = Disk(), torch.zeros(1 << 22)

    def there_and_back() -> None:
        ticket = disk.put(tensor)
        ticket.get()

    return 2 * tensor.nbytes / _fastest(there_and_back, 3)


def available(device: torch.device) -> int:
    """Bytes that a step may take on a device above what is there now."""
    if device.type == "cpu":
        free = psutil.virtual_memory().available
        return int(SHARE * min(free, _cgroup_free(free)))
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return int(SHARE * (free + cached))


def _cgroup_free(default: int) -> int:
    """Under the limit of a container, where there is one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        files = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(files.get("file", 0))
    except (OSError, ValueError):
        return default


def own_bytes(tensor: Tensor) -> int:
    """Of a tensor, or of this rank's part of one that is spread over ranks."""
    local = getattr(tensor, "to_local", None)
    found: Tensor = tensor if local is None else local()
    return found.nbytes


def optimizer_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of the states of optimizers that have stepped, for these weights."""
    known = {id(w) for w in weights}
    return sum(
        own_bytes(t)
        for optimizer in _OPTIMIZERS
        for p, state in optimizer.state.items()
        if id(p) in known
        for t in state.values()
        if isinstance(t, Tensor) and t.device == p.device
    )


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    _OPTIMIZERS.add(optimizer)


register_optimizer_step_post_hook(_stepped)

__all__ = ["DeviceRates", "available", "optimizer_bytes", "own_bytes", "rates"]
