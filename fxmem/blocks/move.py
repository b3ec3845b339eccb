"""The cheap update of one weight, in pieces, so that nothing of the weight's size is made."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxmem.blocks.rounding import stochastic_round

PIECE, LARGE_PIECE = 2**18, 2**22
"""Elements that are worked on at a time, on a CPU (for its caches) and elsewhere."""


def move(
    weight: Tensor, grad: Tensor, rate: float, scale: Tensor | float, *, sign: bool = False,
    limit: float | None = None, bits: int = 0, first: int = 0,
) -> None:  # fmt: skip
    """``weight -= rate * d`` with ``d`` the gradient times ``scale``, clamped to ``limit`` if
    given, or its sign; formed in float32 at least.

    bfloat16 weights are rounded stochastically, by key ``bits``; ``first`` is the index of their
    first element in the whole weight.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if limit is None and isinstance(scale, float) and not sign:
        rate, scale = rate * scale, 1.0
        if weight.dtype is grad.dtype is wide:
            weight.sub_(grad, alpha=rate)
            return
    for at, part, step in _pieces(weight, grad):
        if sign:
            step = step.sign().to(wide)
        else:
            step = step.to(wide)
            if limit is not None or isinstance(scale, Tensor):
                step = step * scale
            if limit is not None:
                step = step.clamp_(-limit, limit)
        if weight.dtype is torch.bfloat16:
            part.copy_(stochastic_round(part.to(wide).sub_(step, alpha=rate), bits, first + at))
        elif part.dtype is wide:
            part.sub_(step, alpha=rate)
        else:
            part.copy_(part.to(wide).sub_(step, alpha=rate))


def _pieces(weight: Tensor, grad: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index of the first element, and views of both, along the first axis."""
    if not weight.dim() or not weight.numel():
        yield 0, weight, grad
        return
    row = math.prod(weight.shape[1:])
    rows = max(1, (PIECE if weight.device.type == "cpu" else LARGE_PIECE) // row)
    for lo in range(0, weight.shape[0], rows):
        yield lo * row, weight[lo : lo + rows], grad[lo : lo + rows]


__all__ = ["PIECE", "move"]
