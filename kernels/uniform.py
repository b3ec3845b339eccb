"""Uniform random numbers as a stateless op: a function of (seed, site, element position).

The position of an element is its index in the whole tensor, not in the chunk, so the numbers do not
depend on the chunking and a replay in the backward draws the same ones. ``seed`` is drawn from
torch's default generator once per forward; ``site`` numbers the draws of a region. The *place* of a
chunk is ``[dim, outer, inner, start, length]``: its dimension ``dim`` is ``outer x rows x inner``
elements, whose rows begin at row ``start`` of ``length``; empty for a whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_DIGITS = {torch.float32: 24, torch.float64: 53}


def _mix(x: Tensor) -> Tensor:
    """32-bit finaliser of MurmurHash3 on int64 lanes."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _WORD
    return x ^ (x >> 16)


def positions(shape: Sequence[int], place: Sequence[int], device: torch.device) -> Tensor:
    """Index in the whole tensor of every element of a chunk of ``shape``."""
    dim, outer, inner, start, length = place or (-1, 1, 1, 0, 0)
    index = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
    stride = 1
    for d in reversed(range(len(shape))):
        at, size = torch.arange(shape[d], device=device), shape[d]
        if d == dim:
            rows, size = shape[dim] // (outer * inner), outer * length * inner
            o, r, i = at // (rows * inner), at // inner % rows, at % inner
            at = (o * length + r + start) * inner + i
        index = index + (at * stride).reshape([-1 if j == d else 1 for j in range(len(shape))])
        stride *= size
    return index


def words(seed: Tensor, site: int, index: Tensor) -> Tensor:
    """A 32-bit word per index. Two keys, so that no two streams are shifted copies."""
    key = _mix((seed + site * 0x9E3779B9) & _WORD)
    other = _mix((key + (index >> 32) + 0x7F4A7C15) & _WORD)
    return _mix(_mix((index + key) & _WORD) ^ other)


@torch.library.custom_op("fxmem::uniform", mutates_args=())
def uniform(
    seed: Tensor, size: Sequence[int], site: int, place: Sequence[int], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Numbers in [0, 1) with every digit of ``dtype`` (float32 or float64) drawn."""
    if not all(size):
        return torch.empty(size, dtype=dtype, device=device)
    seed, digits = seed.to(device), _DIGITS[dtype]
    index = positions(size, place, device)
    bits = words(seed, 2 * site, index)
    if digits > 32:
        bits = bits << (digits - 32) | words(seed, 2 * site + 1, index) >> (64 - digits)
    else:
        bits = bits >> (32 - digits)
    return bits.to(dtype) * 2.0**-digits


@uniform.register_fake
def _(
    seed: Tensor, size: Sequence[int], site: int, place: Sequence[int], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    return torch.empty(size, dtype=dtype, device=device)
