"""What a device has free, what optimizers hold, and how fast it is."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fxmem.measure.remembered import remembered
from fxmem.measure.undisturbed import timed
from fxmem.runtime.offload import Disk
from fxmem.streaming.costs import Rates

SHARE = 0.9
"""Of what is free, the part that ``memory="auto"`` takes."""
_CPU = torch.device("cpu")
CPU = Rates(flops=1e11, bytes=2e10)
DISK = 1e9
"""Where nothing can be measured, since other work has the processor."""
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
    """Measured in about a second on a CPU, once per machine, and nominal while that is busy;
    nominal on a GPU, whose ratio of operations to bytes is all that a choice depends on."""
    if device.type != "cpu":
        return DeviceRates(GPU, {"cpu": LINK, "disk": DISK})
    found = remembered("rates", device, "float32", _measure) or (CPU.flops, CPU.bytes, DISK)
    flops, moved, disk = found
    return DeviceRates(Rates(flops, moved), {"disk": disk})


def _measure() -> list[float]:
    """Operations per second, and bytes per second in memory and to and from the disk; nothing on a
    machine that does other work."""
    a = torch.rand(384, 768)
    b = torch.rand(768, 2048)
    product = _fastest(lambda: a @ b)
    wide = torch.rand(1 << 23)
    out = torch.empty_like(wide)
    added = _fastest(lambda: torch.add(wide, wide, out=out))
    if product is None or added is None:
        return []
    return [2 * 384 * 768 * 2048 / product, 3 * wide.nbytes / added, _disk_rate()]


def _fastest(run: Callable[[], object], times: int = 8) -> float | None:
    """Of those times in which nobody else had the processor."""
    found = [timed(run, _CPU) for _ in range(times)]
    return min((seconds for seconds, alone in found if alone), default=None)


def _disk_rate() -> float:
    """Of writing 16 MiB and reading them, in a file like that of offloaded tensors."""
    disk, tensor = Disk(), torch.zeros(1 << 22)

    def there_and_back() -> None:
        ticket = disk.put(tensor)
        ticket.get()

    return 2 * tensor.nbytes / min(timed(there_and_back, _CPU)[0] for _ in range(3))


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
