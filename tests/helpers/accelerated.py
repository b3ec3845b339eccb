"""What ``accelerate launch`` starts: FSDP2 by its own ``prepare``; plain, streamed, blocks.

On a machine without an accelerator, accelerate takes FSDP for nothing that runs there; it is told
that its processes are those of several devices, and uses the CPU all the same.
"""

from __future__ import annotations

import sys
from typing import Any

import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from double import everything_in_double
from sharded import inputs, state

import fxmem

STEPS, PARTS = 3, 2
BLOCKS: dict[str, Any] = {"inactive": fxmem.SGD(0.1), "reach": "all", "steps": 1}


def plan(blocks: bool) -> fxmem.Plan:
    given = fxmem.Blocks(accumulation="accumulate", **BLOCKS) if blocks else None
    return fxmem.Plan(stream=fxmem.Stream(chunk=9), blocks=given)


def optimizer_of(model: Any, blocks: bool) -> torch.optim.Optimizer:
    if blocks:
        return fxmem.BlockAdamW(model, lr=1e-2)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def run(accelerator: Accelerator, kind: str) -> dict[str, Any]:
    """Steps of two micro-batches, clipped; the optimizer is made before FSDP2 replaces what it has.

    The weights after them.
    """
    accelerator.free_memory()  # of the models before
    model: Any = tiny.model().double()
    if kind != "plain":
        fxmem.transform(model, plan(kind == "blocks"))
    optimizer: Any = optimizer_of(model, kind == "blocks")
    model, optimizer = accelerator.prepare(model, optimizer)
    rank = accelerator.process_index
    for step in range(STEPS):
        for part in range(PARTS):
            with accelerator.accumulate(model):
                accelerator.backward(model(**inputs(rank, PARTS * step + part)).loss)
                if accelerator.sync_gradients and kind != "blocks":
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    kinds = {type(p).__name__ for p in model.parameters()}
    assert kinds == {"DTensor"}, kinds
    return {n: v for n, v in state(model).items() if not n.endswith(".grad")}


def alone() -> dict[str, Any]:
    """The blocks on one process."""
    model: Any = tiny.model().double()
    fxmem.transform(model, plan(blocks=True))
    optimizer = optimizer_of(model, blocks=True)
    for step in range(STEPS):
        for part in range(PARTS):
            losses = [model(**inputs(rank, PARTS * step + part)).loss for rank in range(2)]
            (torch.stack(losses).mean() / PARTS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def main() -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(gradient_accumulation_steps=PARTS)
    assert accelerator.is_fsdp2
    with everything_in_double():
        found = {kind: run(accelerator, kind) for kind in ("plain", "streamed", "blocks")}
    torch.save(found, f"{sys.argv[1]}/{accelerator.process_index}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
