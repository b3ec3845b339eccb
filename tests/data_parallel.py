"""One rank of a step under DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from double import everything_in_double
from torch import Tensor, nn

import fxmem

LENGTHS = (37, 64)
"""One per rank: another number of chunks, so a collective inside a loop would hang."""


def inputs(rank: int) -> dict[str, Tensor]:
    return tiny.batch(2, LENGTHS[rank], padding=("left", "mixed")[rank])


def run_rank(rank: int, file: str, out: str, name: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    with everything_in_double():
        model = tiny.model(name).double()
        fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=9)))
        net: Any = nn.parallel.DistributedDataParallel(model)
        with net.no_sync():
            net(**inputs(1 - rank)).loss.backward()
        net.zero_grad()
        for _ in range(2):
            net(**inputs(rank)).loss.backward()
    bodies = fxmem.explain(model).executed_bodies
    torch.save(({n: p.grad for n, p in model.named_parameters()}, bodies), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()
