"""What a device holds and how fast it is: a table of GPUs, and a measurement of this CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxmem.errors import PlanError
from fxmem.memory.device import LINK, available, rates
from fxmem.streaming.costs import Rates

Home = Literal["cpu", "disk"]
GB = 10**9
REACHED = 0.6
"""Part of a GPU's published rates that large matrix products and copies reach."""
RESERVED = GB
"""Of a GPU's memory, for its context and the libraries' workspaces."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures: bytes of memory; dense operations per second in bfloat16 and in float32
    (on tensor cores where PyTorch's default lets it); bytes of memory traffic per second.
    """

    memory: int
    half: float
    single: float
    traffic: float


GPUS = {
    "a10": Gpu(24 * GB, 125e12, 31.2e12, 0.60e12),
    "a100": Gpu(80 * GB, 312e12, 19.5e12, 2.04e12),
    "a100-40gb": Gpu(40 * GB, 312e12, 19.5e12, 1.56e12),
    "l4": Gpu(24 * GB, 121e12, 30.3e12, 0.30e12),
    "l40s": Gpu(48 * GB, 362e12, 91.6e12, 0.86e12),
    "h100": Gpu(80 * GB, 989e12, 67e12, 3.35e12),
    "h200": Gpu(141 * GB, 989e12, 67e12, 4.8e12),
    "b200": Gpu(180 * GB, 2250e12, 75e12, 7.7e12),
    "3090": Gpu(24 * GB, 71e12, 35.6e12, 0.94e12),
    "4090": Gpu(24 * GB, 165e12, 82.6e12, 1.01e12),
    "5090": Gpu(32 * GB, 210e12, 105e12, 1.79e12),
    "mi250x": Gpu(64 * GB, 191e12, 47.9e12, 1.6e12),
    "mi300x": Gpu(192 * GB, 1307e12, 163e12, 5.3e12),
}
"""By name, from the makers' data sheets; of an MI250X, one of its two dies."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where the step is to run.

    Attributes:
        name: ``"cpu"`` or one of :data:`GPUS`.
        kind: ``"cpu"`` or ``"cuda"``.
        memory: bytes that a step may take there.
        rates: how fast it is.
        home: where tensors wait that leave it: ``"disk"``, or ``"cpu"``, the host of a GPU.
        transfer: bytes per second to and from there.
    """

    name: str
    kind: str
    memory: int
    rates: Rates
    home: Home
    transfer: float


def device_of(name: str, dtype: torch.dtype) -> Device:
    """The device of this name; ``"cpu"`` is this machine's, with the memory that is free now.

    Raises:
        PlanError: a device that is not in the table.
    """
    if name == "cpu":
        cpu = torch.device(name)
        own = rates(cpu)
        return Device(name, name, available(cpu), own.compute, "disk", own.transfer["disk"])
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise PlanError(f"device is {name!r}", advice=f"one of cpu, {', '.join(GPUS)}")
    flops = gpu.half if dtype.itemsize < 4 else gpu.single
    found = Rates(flops * REACHED, gpu.traffic * REACHED)
    return Device(name.lower(), "cuda", gpu.memory - RESERVED, found, "cpu", LINK)
