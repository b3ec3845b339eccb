"""What tests of block training run in processes of their own."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from blocks_cases import ids, make, small, train
from torch import Tensor

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD
from fxmem.errors import FxmemError

KINDS: dict[str, Any] = {"sgd": SGD(0.1), "sign": SignSGD(1e-3), "low_rank": LowRank(rank=2)}


def start(kind: str) -> tuple[Any, Any, Any, Any]:
    """bfloat16 weights, random order, a schedule, visits of four steps."""
    net, opt, state = make(
        dtype=torch.bfloat16, inactive=KINDS[kind], steps=4, reach="all", clip="delayed",
        clip_norm=0.5, always_active=("norm",),
    )  # fmt: skip
    return net, opt, state, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)


def values(net: Any, state: Any) -> list[Tensor]:
    """Everything that learns."""
    terms = [t for a in state.adapters.values() for t in (a.up, a.down)]
    return [t.detach().clone() for t in (*net.parameters(), *terms)]


def resume(saved: str, result: str, first: int, last: int) -> None:
    """Go on from a file of another process, with as many threads: sums depend on their number."""
    given = torch.load(saved, weights_only=True)
    ends = {}
    for kind, (weights, optimizer, scheduler) in given.items():
        net, opt, state, schedule = start(kind)
        net.load_state_dict(weights)
        opt.load_state_dict(optimizer)
        schedule.load_state_dict(scheduler)
        train(net, opt, range(first, last), schedule)
        ends[kind] = values(net, state)
    torch.save(ends, result)


JOINT: dict[str, dict[str, Any]] = {
    "sgd": {"inactive": SGD(0.1), "reach": "all"},
    "sign": {"inactive": SignSGD(1e-2), "accumulation": "accumulate"},
    "low_rank": {"inactive": LowRank(rank=2), "reach": "all"},
}


def joint(rank: int, world: int, kind: str) -> list[Tensor]:
    """Five steps on the rank's share of each batch of four rows."""
    net, opt, state = make(average=world > 1, optimizer={"max_grad_norm": 0.5}, **JOINT[kind])
    rows = slice(4 // world * rank, 4 // world * (rank + 1))
    for step in range(5):
        for part in range(1 + (kind == "sign")):
            gen = torch.Generator().manual_seed(10 * step + part)
            net(torch.randint(0, 13, (4, 12), generator=gen)[rows]).backward()
        opt.step()
        net.zero_grad()
    return values(net, state)


UNEQUAL: dict[str, dict[str, Any]] = {
    "sgd": {"inactive": SGD(0.1), "reach": "all"},
    "clipped": {"inactive": SGD(0.1), "reach": "all", "clip": "delayed", "clip_norm": 0.01},
    "sign": {"inactive": SignSGD(1e-2), "reach": "all"},
    "micro": {"inactive": SGD(0.1), "reach": "all", "accumulation": "micro", "micro_batches": 1},
    "accumulate": {"inactive": SGD(0.1), "accumulation": "accumulate"},
    "low_rank": {"inactive": LowRank(rank=2), "reach": "all"},
}
LENGTHS = ((12, 3), (4, 31), (11, 17), (2, 5))
"""Of both ranks at each step: one chunk and several, which hand gradients on in other orders."""


def unequal(rank: int, world: int, kind: str) -> list[Tensor]:
    """Steps on one sequence per rank, each of another length; a single process takes both."""
    net, opt, state = make(average=world > 1, steps=1, **UNEQUAL[kind])
    for step, lengths in enumerate(LENGTHS):
        losses = [net(ids(10 * step + i, 2, n)) for i, n in enumerate(lengths)
                  if world == 1 or i == rank]  # fmt: skip
        torch.stack(losses).mean().backward()
        if world > 1:  # a reduction of the user's own between backward and step
            dist.all_reduce(losses[0].detach())
        opt.step()
        net.zero_grad()
    return values(net, state)


def run_rank(rank: int, world: int, file: str, out: str) -> None:
    """All cases on one of several processes, and what is refused there."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.save({kind: joint(rank, world, kind) for kind in JOINT}, f"{out}/{rank}.pt")
    net: Any = small(dtype=torch.float32)
    fxmem.transform(net, Plan(blocks=Blocks(inactive=SGD(0.1))))
    BlockAdamW(net)
    try:
        net(torch.zeros(1, 12, dtype=torch.long))
    except FxmemError as error:
        torch.save(str(error), f"{out}/error{rank}.pt")
    dist.destroy_process_group()


def run_unequal(rank: int, world: int, file: str, out: str, kinds: tuple[str, ...]) -> None:
    """Ranks whose sequences differ in length."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.save({kind: unequal(rank, world, kind) for kind in kinds}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    resume(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
