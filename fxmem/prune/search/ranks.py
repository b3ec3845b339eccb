"""A search over several ranks, and weight gradients of sub-models brought back to dense ones.

Masks regenerate from the seed and the snapshot's probabilities on every rank, so ranks exchange
loss scalars only. All compute the same update; the probabilities stay equal without a broadcast,
and a hash of them is compared at every refresh.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxmem.errors import DivergedError

Kept = Mapping[str, Sequence[tuple[int, Tensor]]]
"""Per parameter the kept indices of its cut axes, as (axis, int64 indices)."""


class Ranks:
    """Exchange of losses over a `torch.distributed` process group, the default one if None."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.world: int = dist.get_world_size(group)

    def losses(self, local: Tensor) -> Tensor:
        """All ranks' rows of a (K / world, T) table, as (K, T), row k from rank k % world."""
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local, group=self.group)
        return torch.stack(parts, 1).reshape(-1, local.shape[1])

    def agree(self, s: Tensor) -> None:
        """Compare the ranks' probabilities by hash.

        Raises:
            DivergedError: they differ in any bit.
        """
        digest = hashlib.sha256(s.numpy().tobytes()).digest()[:8]
        mine = torch.tensor([int.from_bytes(digest, signed=True)])
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine, group=self.group)
        if any(int(part) != int(mine) for part in parts):
            raise DivergedError("the ranks' keep probabilities differ")


def reduce_gradients(
    own: Mapping[int, Mapping[str, Tensor]],
    kept: Sequence[Kept],
    ratios: Tensor,
    shapes: Mapping[str, torch.Size],
    exchange: Any,
) -> dict[str, Tensor]:
    """Dense weight gradients from those of K sub-models: ``1/K sum_k ratio_k * gradient_k``.

    Unbiased for the gradient of the expected loss at the probabilities the ratios lead to. Only
    kept entries travel: all ranks know every mask, so sizes and places need no message.

    Args:
        own: this rank's sub-model gradients by mask number, per parameter in its sliced shape.
        kept: for all K masks, the kept indices per parameter; uncut parameters may be left out.
        ratios: float64 (K,), full likelihood ratio of each mask.
        shapes: dense shape of every parameter.
        exchange: `Ranks`, or `fxmem.prune.search.snapshot.Alone`.

    Returns:
        Dense gradients; entries that no mask keeps are exactly 0.
    """
    any_tensor = next(iter(next(iter(own.values())).values()))
    dense = {name: any_tensor.new_zeros(shape) for name, shape in shapes.items()}
    for k, places in enumerate(kept):
        sliced = {name: _cut(shape, places.get(name, ())) for name, shape in shapes.items()}
        flat = any_tensor.new_empty(sum(shape.numel() for shape in sliced.values()))
        owner = k % exchange.world
        if owner == exchange.rank:
            flat = torch.cat([own[k][name].reshape(-1) for name in shapes])
        if exchange.world > 1:
            dist.broadcast(flat, group_src=owner, group=exchange.group)
        parts = flat.split([shape.numel() for shape in sliced.values()])
        for part, (name, shape) in zip(parts, sliced.items(), strict=True):
            grid = _grid(shapes[name], places.get(name, ()))
            dense[name][grid] += part.view(shape) * (float(ratios[k]) / len(kept))
    return dense


def _cut(shape: torch.Size, places: Sequence[tuple[int, Tensor]]) -> torch.Size:
    sizes = list(shape)
    for axis, index in places:
        sizes[axis] = len(index)
    return torch.Size(sizes)


def _grid(shape: torch.Size, places: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, ...]:
    """Index that selects the kept entries as an outer product of its axes."""
    kept = dict(places)
    axes = []
    for axis, size in enumerate(shape):
        index = kept.get(axis, torch.arange(size))
        axes.append(index.view([-1 if i == axis else 1 for i in range(len(shape))]))
    return tuple(axes)
