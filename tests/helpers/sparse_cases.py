"""Masks and batches of the sparse step, importable by the processes that a test starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from prune_cases import build
from sharded import by_layer

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


ROWS = (5, 9, 17, 12)
OPTIONS: dict[str, Any] = {"gates": {"batches": 2}, "score": {"samples": 2}}


def streamed(model: Any) -> Any:
    """Of short chunks, so that the lengths of ranks make different numbers of them."""
    return fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=4, loss_chunk=4)))


def searched(estimator: str, group: Any = None, prepare: Any = None) -> fxmem.Masks:
    """A search on batches of unequal lengths, which ranks take in turn."""
    batches = []
    for n in ROWS:
        ids = torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n))
        batches.append({"input_ids": ids, "labels": ids})
    options = fxmem.Prune(steps=6, estimator=estimator, advanced=OPTIONS[estimator])
    return fxmem.search(build("llama"), batches, options, group=group, prepare=prepare)


def in_groups(rank: int) -> tuple[list[fxmem.Masks], float, dict[str, torch.Tensor], list[str]]:
    """Searches of two ranks, the last with sub-models that stream; a sparse step of a model that
    streams on batches of their own; and what is refused.
    """
    world = dist.group.WORLD
    found = [searched(estimator, world) for estimator in OPTIONS]
    found.append(searched("gates", world, streamed))
    model: Any = streamed(build("llama"))
    units = fxmem.coupling(model)
    masks = drawn(units, ("kv_groups", "mlp_channels"))
    own = {k: v[:, : 9 - 4 * rank] for k, v in batch().items()}
    loss = fxmem.sparse_backward(model, masks, own, ratios=RATIOS, coupled=units, group=world)
    sharded: Any = build("llama")
    by_layer(sharded)
    messages = []
    for one in (torch.nn.parallel.DistributedDataParallel(build("llama")), sharded):
        tries: list[Callable[[], Any]] = [
            partial(fxmem.coupling, one),
            partial(fxmem.materialize, one, masks[0], units),
            partial(fxmem.sparse_backward, one, masks, own, coupled=units, group=world),
            partial(fxmem.search, one, [own], coupled=units),
            partial(fxmem.score, one, [own], "magnitude", coupled=units),
            fxmem.masked(one, masks[0], units).__enter__,
        ]
        for call in tries:
            try:
                call()
                messages.append("no error")
            except fxmem.PlanError as error:
                messages.append(str(error))
    return found, loss, gradients(model), messages
