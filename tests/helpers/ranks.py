"""Several processes on this machine, and what a function returns in each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from double import everything_in_double


def on_ranks(fn: Callable[..., Any], *args: Any, count: int = 2, double: bool = True) -> list[Any]:
    """``fn(rank, *args)`` in ``count`` processes of one gloo group; ``double``: in float64."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, count, double, fn, args), nprocs=count)
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(count)]


def _rank(
    rank: int, folder: str, count: int, double: bool, fn: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    try:
        with everything_in_double() if double else nullcontext():
            result = fn(rank, *args)
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
