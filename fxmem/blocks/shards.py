"""Parameters of which each rank has a part (``fully_shard``): sums over the ranks, and numbering.

A part is a ``DTensor``. What is done element by element is done on the local tensor; what needs the
whole tensor (a norm, whether all entries are finite) is summed over the ranks that have the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Other ranks have the rest of it."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank has, in the same memory."""
    if not is_shard(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def cut(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole ``value`` that this rank has of ``like``; sends nothing."""
    if not is_shard(like) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    made: Tensor = distribute_tensor(value, mesh, placements, src_data_rank=None)
    return made


def sum_of_parts(value: Tensor, of: Tensor) -> Tensor:
    """``value`` of this rank, summed in place over those that have the other parts of ``of``."""
    if is_shard(of):
        for dim, _ in _cuts(of):
            dist.all_reduce(value, group=of.device_mesh.get_group(dim))  # type: ignore[attr-defined]
    return value


def mean_of_ranks(value: Tensor, beside: Tensor) -> Tensor:
    """In place, over all ranks that have parts or copies of ``beside``."""
    mesh: Any = beside.device_mesh  # type: ignore[attr-defined]
    for group in mesh.get_all_groups():
        dist.all_reduce(value, group=group)
    return value.div_(mesh.size())


def first_element(shard: Tensor) -> int:
    """Index in the whole tensor of the first element here, where rows are divided; where another
    axis is, a number that only this rank starts from.
    """
    at = 0
    for dim, axis in _cuts(shard):
        mesh: Any = shard.device_mesh  # type: ignore[attr-defined]
        count, rows = mesh.size(dim), shard.shape[axis]
        first = min(mesh.get_local_rank(dim) * -(-rows // count), rows)
        at += first * shard.numel() // max(rows, 1)
    return at


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Of whole tensors and parts together."""
    parts = [g for g in grads if is_shard(g)]
    norm = torch.nn.utils.get_total_norm([g for g in grads if not is_shard(g)])
    if parts:
        square = torch.nn.utils.get_total_norm([local(g) for g in parts]).square()
        norm = (norm.square() + sum_of_parts(square, parts[0])).sqrt()
    return norm


def _cuts(shard: Tensor) -> Iterator[tuple[int, int]]:
    """Dimensions of the mesh that divide a tensor, each with the axis that it divides."""
    if is_shard(shard):
        for dim, placement in enumerate(shard.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                yield dim, placement.dim


__all__ = [
    "cut", "first_element", "is_shard", "local", "mean_of_ranks", "sum_of_parts", "total_norm",
]  # fmt: skip
