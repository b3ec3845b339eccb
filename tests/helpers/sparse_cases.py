"""Masks and batches of the sparse step, importable by the processes that a test starts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from prune_cases import build

import fxmem

RATIOS = [0.5, 1.0, 1.75, 0.25]


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "labels": ids}


def drawn(units: fxmem.Coupling, kinds: tuple[str, ...], empty: str = "") -> list[fxmem.Masks]:
    """One mask per ratio; the group ``empty`` keeps nothing in the first."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for k in range(len(RATIOS)):
        bools = {}
        for g in units.groups:
            keep = torch.rand(g.size, generator=generator) < 0.5
            keep[: max(1, g.least)] = True
            bools[g.name] = keep if g.kind in kinds else torch.ones(g.size, dtype=torch.bool)
            if k == 0 and g.name == empty:
                bools[g.name] = torch.zeros(g.size, dtype=torch.bool)
        out.append(fxmem.Masks.from_bools(units, bools))
    return out


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def run_rank(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model: Any = build("llama")
    units = fxmem.coupling(model)
    masks = drawn(units, ("kv_groups", "mlp_channels"))
    loss = fxmem.sparse_backward(
        model, masks, batch(), ratios=RATIOS, coupled=units, group=dist.group.WORLD
    )
    torch.save((loss, gradients(model)), f"{out}/{rank}.pt")
    dist.destroy_process_group()
