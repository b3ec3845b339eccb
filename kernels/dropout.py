"""Dropout as a stateless op: the mask is a function of (seed, site, element position).

The position of an element is its index in the whole tensor, not in the chunk, so the mask does not
depend on the chunking and a replay in the backward draws the same one. ``seed`` is drawn from
torch's default generator once per forward; ``site`` numbers the dropout calls of a region.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """32-bit finaliser of MurmurHash3 on int64 lanes."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _WORD
    return x ^ (x >> 16)


def positions(
    shape: Sequence[int],
    dim: int,
    outer: int,
    inner: int,
    start: int,
    length: int,
    device: torch.device,
) -> Tensor:
    """Whole-tensor index of every element of a chunk: dimension ``dim`` is ``outer x rows x
    inner``, its rows start at ``start`` of ``length``.
    """
    rows = shape[dim] // (outer * inner)
    full = list(shape)
    full[dim] = outer * length * inner
    index = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
    stride = 1
    for d in reversed(range(len(shape))):
        at = torch.arange(shape[d], device=device)
        if d == dim:
            o, r, i = at // (rows * inner), at // inner % rows, at % inner
            at = (o * length + r + start) * inner + i
        index = index + (at * stride).reshape([-1 if j == d else 1 for j in range(len(shape))])
        stride *= full[d]
    return index


def apply(x: Tensor, seed: Tensor, p: float, site: int, index: Tensor) -> Tensor:
    """``x`` with elements dropped with probability ``p`` and the rest scaled by ``1 / (1 - p)``."""
    key = _mix((seed + site * 0x9E3779B9) & _WORD)
    bits = _mix(((index & _WORD) + key) & _WORD) ^ _mix((index >> 32) + 0x7F4A7C15)
    keep = _mix(bits & _WORD) >= round(p * (_WORD + 1))
    return x * keep.to(x.dtype) * (0.0 if p >= 1 else 1.0 / (1.0 - p))


def chunk(
    x: Tensor,
    seed: Tensor,
    p: float,
    site: int,
    dim: int,
    outer: int,
    inner: int,
    start: int,
    length: int,
) -> Tensor:
    """Dropout of a chunk whose rows begin at row ``start`` of ``length``."""
    if not x.numel():
        return x
    return apply(x, seed, p, site, positions(x.shape, dim, outer, inner, start, length, x.device))


@torch.library.custom_op("fxmem::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float, site: int) -> Tensor:
    """Dropout of a whole tensor; ``seed`` is an int64 scalar tensor."""
    if not x.numel():
        return x.clone()
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    return apply(x, seed, p, site, index)


@dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float, site: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, seed, ctx.p, ctx.site = inputs
    ctx.save_for_backward(seed)


def _vjp(ctx, grad):
    (seed,) = ctx.saved_tensors
    return dropout(grad, seed, ctx.p, ctx.site), None, None, None


dropout.register_autograd(_vjp, setup_context=_setup)
