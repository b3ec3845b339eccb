"""Stochastic rounding of float32 to bfloat16 by a counter-based hash: the reference.

The random bits of an element are a function of (key, element index) alone, so an update is the same
for any chunking, block size, shard and device, and no generator is advanced. Rounding to nearest
loses updates below half a unit in the last place; stochastic rounding keeps them on average (Gupta
et al., 2015, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """32-bit finaliser of MurmurHash3 on int64 lanes."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _WORD
    return x ^ (x >> 16)


def key(seed: int, *parts: int) -> int:
    """A key in ``[0, 2^31)`` from a seed and, say, parameter number, step and micro-step."""
    state = 0x2545F491
    for part in (seed, *parts):
        for word in (part & _WORD, part >> 32 & _WORD):
            state = int(_mix(torch.tensor((state ^ word) + 0x9E3779B9 & _WORD)))
    return state & 0x7FFFFFFF


def random_bits(index: Tensor, key: int) -> Tensor:
    """32 bits (int64 in ``[0, 2^32)``) for every element number in ``index`` (int64)."""
    salt = _mix(torch.tensor(key + 0x9E3779B9 & _WORD, device=index.device))
    low = _mix((index & _WORD) + salt & _WORD)
    return _mix(low ^ _mix((index >> 32) + 0x7F4A7C15 & _WORD))


def round_to(x: Tensor, dtype: torch.dtype, index: Tensor, key: int) -> Tensor:
    """``x`` (float32) in ``dtype``: rounded stochastically to bfloat16, as it is to float32."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    pattern = x.contiguous().view(torch.int32)
    low = (random_bits(index, key) & 0xFFFF).to(torch.int32)
    rounded = ((pattern + low) & ~0xFFFF).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def element_index(shape: torch.Size, first: int, pitch: int, device: torch.device) -> Tensor:
    """Numbers of a matrix's elements within the whole parameter: rows are ``pitch`` apart."""
    rows, columns = (torch.arange(n, device=device) for n in shape)
    return first + rows[:, None] * pitch + columns
