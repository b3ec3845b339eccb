"""Abstract losses for the search loop, and what its test processes run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmem.errors import FxmemError
from fxmem.prune.search import estimator as est
from fxmem.prune.search.draw_masks import draw
from fxmem.prune.search.loop import Loop
from fxmem.prune.search.ranks import Ranks, reduce_gradients
from fxmem.prune.search.snapshot import Snapshot
from fxmem.prune.units.settings import ScoreSettings

N = 12
COST = torch.ones(N, dtype=torch.float64)
LAYER = torch.arange(N) // 4
HALF = torch.full((N,), 0.5, dtype=torch.float64)
BASE = ScoreSettings(
    steps=24,
    lr=0.05,
    age=4,
    epsilon=0.02,
    decay="none",
    history=0,
    widen=1.0,
    standardise=False,
    alpha=0.5,
    metric="euclidean",
)


class Toy:
    """Losses of removed units with pair terms; counts what it builds."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.a = torch.randn(N, generator=g, dtype=torch.float64).abs()
        q = torch.randn(N, N, generator=g, dtype=torch.float64) / 4
        self.q = q @ q.T
        self.built = 0

    def exact(self, mask: Tensor) -> float:
        gone = 1 - mask.double()
        return float(gone @ self.a + 0.5 * gone @ self.q @ gone)

    def __call__(self, mask: Tensor) -> Any:
        self.built += 1
        value = self.exact(mask)
        return lambda batch: value + 0.1 * math.sin(batch + value)


def make(options: ScoreSettings, toy: Any = None, start: Tensor = HALF, **kw: Any) -> Loop:
    toy = toy or Toy()
    return Loop(start, COST, LAYER, N / 2, options, toy, list(range(7)), **kw)


def drawn(loop: Loop) -> Snapshot:
    """The snapshot that the loop uses."""
    assert loop.snapshot is not None
    return loop.snapshot


def run(loop: Loop, steps: int | None = None) -> Tensor:
    for _ in range(steps or loop.options.steps):
        loop.step()
    return loop.s


def run_rank(rank: int, world: int, file: str, out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for resident in ("one", "all"):
        ranks = Ranks()
        s = run(make(replace(BASE, resident=resident), exchange=ranks))
        torch.save(s, f"{out}/{resident}{rank}.pt")
    torch.save(sparse_step(ranks), f"{out}/weights{rank}.pt")
    try:
        ranks.agree(torch.full((3,), float(rank), dtype=torch.float64))
    except FxmemError as error:
        torch.save(str(error), f"{out}/error{rank}.pt")
    dist.destroy_process_group()


def sparse_step(exchange: Any) -> dict[str, Tensor]:
    """One sparse step of a two-layer MLP whose hidden units are the masks."""
    torch.manual_seed(0)
    up, down = torch.randn(N, 3, dtype=torch.float64), torch.randn(2, N, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    masks = torch.stack([draw(HALF, 0, 0, k) for k in range(4)])
    ratio = est.weights(
        est.log_ratio(masks, HALF + 0.1, HALF, torch.zeros(N, dtype=torch.int64)), math.inf
    )[:, 0]
    index = [m.nonzero()[:, 0] for m in masks]
    kept = [{"up": [(0, i)], "down": [(1, i)]} for i in index]
    own = {}
    for k in range(exchange.rank, 4, exchange.world):
        a, b = up[index[k]].requires_grad_(), down[:, index[k]].requires_grad_()
        (torch.tanh(x @ a.T) @ b.T).square().mean().backward()
        own[k] = {"up": a.grad, "down": b.grad}
    shapes = {"up": up.shape, "down": down.shape}
    return reduce_gradients(own, kept, ratio, shapes, exchange)
