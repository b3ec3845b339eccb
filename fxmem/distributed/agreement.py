"""What ranks compare before they send anything else, so that none waits for another in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from fxmem.errors import DivergedError


def agree(
    facts: Mapping[str, int], groups: Sequence[dist.ProcessGroup | None], device: torch.device
) -> None:
    """Compare numbers by what they stand for, along each group in turn; None is that of all.

    Raises:
        DivergedError: on every rank, where they differ; says in what.
    """
    own = torch.tensor([*facts.values()], dtype=torch.int64, device=device)
    largest = torch.cat([own, -own])
    for group in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    most, least = largest.chunk(2)
    if wrong := [f for f, same in zip(facts, (most == -least).tolist(), strict=True) if not same]:
        raise DivergedError(f"the ranks that train one model have different {', '.join(wrong)}")


__all__ = ["agree"]
