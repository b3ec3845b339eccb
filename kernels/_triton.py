"""The one place that imports Triton, and the one door through which its kernels are launched.

Without Triton every kernel module still imports: :func:`jit` leaves the function as it is, and
:func:`why_no_triton` says why nothing can be launched. Under :func:`recording` launches are noted
instead of run; the ahead-of-time compiler reads from them exactly what a launcher would start, for
tensors of any size on the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxmem._compat.graph import FakeTensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this system
    triton = tl = None

GPU_TYPES = ("cuda", "xpu")  # torch calls AMD's devices "cuda" too


def jit(fn: Callable[..., Any]) -> Any:
    """``triton.jit`` where Triton is there."""
    return fn if triton is None else triton.jit(fn)


def interpreted() -> bool:
    """Triton was imported with ``TRITON_INTERPRET=1``: kernels run on the CPU, one by one."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def why_no_triton(device: torch.device) -> str:
    """Why Triton cannot run on ``device``; empty where it can."""
    if triton is None:
        return "Triton is not installed"
    if interpreted():
        return "" if device.type == "cpu" else "Triton's interpreter runs on the CPU only"
    if device.type not in GPU_TYPES:
        return f"Triton has no backend for device type {device.type}"
    return ""


@dataclass(frozen=True)
class Config:
    """A tuning configuration: block sizes by kernel argument, warps, pipeline stages."""

    warps: int
    stages: int
    blocks: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = " ".join(f"{name.removeprefix('BLOCK_')}{n}" for name, n in self.blocks.items())
        return f"{sizes} w{self.warps} s{self.stages}".strip()


def config(warps: int, stages: int, **blocks: int) -> Config:
    """``config(4, 2, M=64)``: block size ``BLOCK_M`` of 64, 4 warps, 2 stages."""
    return Config(warps, stages, {f"BLOCK_{name}": size for name, size in blocks.items()})


@dataclass(frozen=True)
class Launch:
    """What a launcher would start: the kernel, its arguments without block sizes, the rest."""

    fn: Any
    grid: tuple[int, ...]
    config: Config
    args: Mapping[str, Any]


_records: list[tuple[list[Launch], bool]] = []


@contextlib.contextmanager
def recording(amd: bool = False) -> Iterator[list[Launch]]:
    """Inside, launches are appended to the list and nothing runs; ``amd``: as on an AMD device."""
    _records.append(([], amd))
    try:
        yield _records[-1][0]
    finally:
        _records.pop()


def on_amd() -> bool:
    """Default configurations differ there: other register files, 64 KiB of shared memory."""
    return _records[-1][1] if _records else torch.version.hip is not None


def launch(fn: Any, grid: tuple[int, ...], config: Config, /, **args: Any) -> None:
    """Start ``fn`` on ``grid`` programs; an empty grid starts nothing, nor do fake tensors, over
    which memory is predicted.
    """
    if 0 in grid or any(isinstance(x, FakeTensor) for x in args.values()):
        return
    if _records:
        _records[-1][0].append(Launch(fn, grid, config, args))
        return
    where: Any = contextlib.nullcontext()
    if not interpreted():
        where = torch.cuda.device_of(next(x for x in args.values() if isinstance(x, Tensor)))
    with where:
        fn[grid](**args, **config.blocks, num_warps=config.warps, num_stages=config.stages)


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: TF32 where torch's own matmul may use it, else by three
    TF32 products, which keeps float32's accuracy on tensor cores (Ootomo and Yokota, 2022).
    """
    if dtype != torch.float32 or on_amd():
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def processors(device: torch.device) -> int:
    """Multiprocessors of a device, for choosing how far to split; 108 (A100) where not known."""
    if device.type == "cuda" and not _records:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if interpreted() else 108
