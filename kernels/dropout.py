"""Dropout as a stateless op: the mask is a function of (seed, site, element position).

It differs from a product with drawn numbers in what it keeps: the backward draws the mask again.
Seed, site and place are those of :mod:`fxmem.kernels.uniform`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxmem.kernels.uniform import positions, words


@torch.library.custom_op("fxmem::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float, site: int, place: Sequence[int]) -> Tensor:
    """``x`` with elements dropped with probability ``p`` and the rest scaled by ``1 / (1 - p)``."""
    if not x.numel():
        return x.clone()
    bits = words(seed.to(x.device), 2 * site, positions(x.shape, place, x.device))
    keep = bits >= round(p * 2**32)
    return x * keep.to(x.dtype) * (0.0 if p >= 1 else 1.0 / (1.0 - p))


@dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float, site: int, place: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, seed, ctx.p, ctx.site, ctx.place = inputs
    ctx.save_for_backward(seed)


def _vjp(ctx, grad):
    (seed,) = ctx.saved_tensors
    return dropout(grad, seed, ctx.p, ctx.site, ctx.place), None, None, None, None


dropout.register_autograd(_vjp, setup_context=_setup)
