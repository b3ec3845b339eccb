"""Block training inside DistributedDataParallel, and the same on one process with both batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from blocks_cases import STREAM, ids, make, small
from blocks_worker import LENGTHS, UNEQUAL, values
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, Plan
from fxmem.errors import FxmemError

DDP = nn.parallel.DistributedDataParallel
KINDS: dict[str, dict[str, Any]] = {
    **UNEQUAL,
    "frozen": {"inactive": None},
    "last": {"inactive": SGD(0.1), "accumulation": "last"},
}
PARTS = {"micro": 2, "accumulate": 2, "frozen": 2, "last": 3}
"""Micro-batches of a step; all but the last inside ``no_sync``."""
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}  # fmt: skip


def run(rank: int, kind: str, options: dict[str, bool] | None = None, *, late: bool = False
        ) -> list[Tensor]:  # fmt: skip
    """Steps whose visits are of one step each; ``options`` of the wrapper, or None on one process.
    ``late``: the transform comes after the wrapper. What the user clips is as after the wrapper.
    """
    given = dict(KINDS[kind])
    parts = PARTS.get(kind, 1)
    if kind == "micro":
        given["micro_batches"] = parts
    if late and options is not None:
        model: Any = small()
        net = DDP(model, **options)
        fxmem.transform(net, Plan(stream=STREAM, blocks=Blocks(steps=1, **given)))
        opt = BlockAdamW(net, lr=0.01)
        state = opt.blocks
    else:
        model, opt, state = make(steps=1, **given)
        net = model if options is None else DDP(model, **options)
    for step, lengths in enumerate(LENGTHS):
        for part in range(parts):
            last = part == parts - 1
            if options is None:
                state.is_last_micro_batch = lambda last=last: last
            with net.no_sync() if options is not None and not last else nullcontext():
                losses = [net(ids(100 * part + 10 * step + i, 2, n)) for i, n in enumerate(lengths)
                          if options is None or i == rank]  # fmt: skip
                torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_([p for n, p in model.named_parameters() if n in state.active], 0.1)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            net(ids(0))
    return values(model, state)


def runs(rank: int, asked: list[tuple[str, str, bool]]) -> list[list[Tensor]]:
    return [run(rank, kind, OPTIONS[option], late=late) for kind, option, late in asked]


def of_some_ranks(rank: int) -> list[Tensor]:
    """Ranks 0 and 2 of three train together."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return []
    model, opt, state = make(steps=1, **KINDS["clipped"])
    net = DDP(model, process_group=group)
    for step, lengths in enumerate(LENGTHS):
        net(ids(10 * step + rank // 2, 2, lengths[rank // 2])).backward()
        opt.step()
        opt.zero_grad()
    return values(model, state)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.inner(x)
        return loss


def _hooked(model: nn.Module, *, late: bool) -> None:
    net = DDP(model)
    if late:
        net(ids(0))
    net.register_comm_hook(None, default_hooks.allreduce_hook)
    net(ids(0))


def _joined(model: nn.Module) -> None:
    net = DDP(model)
    with net.join():
        net(ids(0))


def _restored(model: nn.Module) -> None:
    net = DDP(model)
    net(ids(0)).backward()
    fxmem.restore(model)
    net(ids(0))


def refusals(rank: int) -> dict[str, str]:
    """What each use is told."""
    uses: dict[str, Callable[[nn.Module], Any]] = {
        "hook": lambda m: _hooked(m, late=False),
        "late hook": lambda m: _hooked(m, late=True),
        "join": _joined,
        "restored": _restored,
        "part": lambda m: DDP(Around(m))(ids(0)),
    }
    found = {}
    for name, use in uses.items():
        model, _opt, _state = make(inactive=SGD(0.1))
        try:
            use(model)
        except FxmemError as error:
            found[name] = str(error)
    return found
