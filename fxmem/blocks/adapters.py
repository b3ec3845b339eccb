"""Low-rank terms beside weights: creation, learning by Adam, and the final merge."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.blocks.partition import resolve
from fxmem.blocks.shards import cut
from fxmem.errors import BlockStateError
from fxmem.plan.blocks import LowRank
from fxmem.roles.roles import Adapter


def create(model: nn.Module, plan: LowRank, names: set[str], seed: int) -> dict[str, Adapter]:
    """One term per matrix among ``names``; tables of nn.Embedding and excluded ones get none.

    ``up [m, r]`` is zero, ``down [r, n]`` uniform within ``1 / sqrt(n)``, both at least float32.
    The global random generator is not touched.

    Raises:
        PlanError: an excluded name that the model does not have.
    """
    out = set(resolve(model, plan.exclude, "LowRank.exclude"))
    tables = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    made = {}
    for name, p in model.named_parameters():
        if p.ndim != 2 or name not in names or name in out or id(p) in tables:
            continue
        dtype = torch.promote_types(p.dtype, torch.float32)
        gen = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(62))
        bound = 1 / math.sqrt(p.shape[1])
        down = torch.empty(plan.rank, p.shape[1], dtype=dtype).uniform_(
            -bound, bound, generator=gen
        )
        up = torch.zeros(p.shape[0], plan.rank, dtype=dtype)
        made[name] = Adapter(
            nn.Parameter(up.to(p.device)), nn.Parameter(down.to(p.device)), plan.alpha / plan.rank
        )
    return made


def follow(adapters: Mapping[nn.Parameter, Adapter]) -> None:
    """Move terms to the devices of their weights, as ``model.to`` does not know them."""
    for p, adapter in adapters.items():
        for term in (adapter.up, adapter.down):
            if term.device != p.device:
                term.data = term.data.to(p.device)


@torch.no_grad()
def merge(model: nn.Module, adapters: dict[str, Adapter]) -> int:
    """Add every term to its weight, once, in float32 or wider, and reset ``up`` to zero.

    Returns:
        The number of weights that changed.
    """
    weights = dict(model.named_parameters())
    for name, adapter in adapters.items():
        p = weights[name]
        wide = torch.promote_types(p.dtype, torch.float32)
        term = cut(adapter.scale * (adapter.up.to(wide) @ adapter.down.to(wide)), p)
        p.copy_(p.to(wide) + term)
        adapter.up.zero_()
    return len(adapters)


def values(adapters: dict[str, Adapter]) -> dict[str, dict[str, Tensor]]:
    """The terms by weight, for a state_dict."""
    return {n: {"up": a.up.detach(), "down": a.down.detach()} for n, a in adapters.items()}


def check(adapters: dict[str, Adapter], saved: dict[str, Any]) -> None:
    """Refuse saved terms of other weights or ranks.

    Raises:
        BlockStateError: names the first that differs.
    """
    if adapters.keys() != saved.keys():
        odd = min(adapters.keys() ^ saved.keys())
        raise BlockStateError(f"only one of saved and present state has a low-rank term of {odd!r}")
    for name, adapter in adapters.items():
        for part in ("up", "down"):
            here, there = tuple(getattr(adapter, part).shape), tuple(saved[name][part].shape)
            if here != there:
                raise BlockStateError(f"saved {part} of {name!r} is {there}, present {here}")


@torch.no_grad()
def load(adapters: dict[str, Adapter], saved: dict[str, Any]) -> None:
    """Take over checked values."""
    for name, adapter in adapters.items():
        adapter.up.copy_(saved[name]["up"])
        adapter.down.copy_(saved[name]["down"])


__all__ = ["check", "create", "follow", "load", "merge", "values"]
