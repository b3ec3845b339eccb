"""Losses of the logits of some rows alone, as those of an answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def logps(z: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.0, ids.shape[1], dtype=z.dtype)
    return -(z.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * weights).mean()


def best_of_teacher(z: Tensor, _: Tensor, teacher: Tensor) -> Tensor:
    want, index = teacher.log_softmax(-1).topk(10)
    found = z.log_softmax(-1).gather(-1, index)
    return (want.exp() * (want - found)).sum(-1).mean()


def entropy(z: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    logs = z.log_softmax(-1)
    return (
        nn.functional.cross_entropy(z.flatten(0, 1), ids.flatten())
        + (logs.exp() * logs).sum(-1).mean()
    )


def one_by_one(z: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    """As TRL does in half precision."""
    found = [
        row.log_softmax(-1).gather(-1, i[:, None]) for row, i in zip(z, ids, strict=True)
    ]  # fmt: skip
    return -torch.stack(found).mean()


LOSSES: dict[str, Loss] = {
    "logps": logps,
    "one by one": one_by_one,
    "best of teacher": best_of_teacher,
    "entropy": entropy,
}
