"""Stochastic rounding to bfloat16 without generator state.

The bits of an element depend on its key and global index alone, so any chunking or sharding gives
equal results. Adding 16 uniform low bits to a float32 and cutting them off rounds it to bfloat16
without bias.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key(seed: int, name: str, step: int, micro: int = 0) -> int:
    """A 32-bit key of one update of one parameter, the same in every process."""
    text = f"{seed}/{name}/{step}/{micro}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def _mix(x: Tensor) -> Tensor:
    """Avalanche of 32-bit integers held in int64 (Wellons' lowbias32)."""
    mask = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
    x = ((x ^ (x >> 15)) * 0x735A2D97) & mask
    return x ^ (x >> 15)


def stochastic_round(value: Tensor, update_key: int, offset: int = 0) -> Tensor:
    """Round float32 `value` to bfloat16; `offset` is the global index of its first element.

    Non-finite elements are cast unchanged.
    """
    value = value.contiguous()
    index = torch.arange(value.numel(), device=value.device).view(value.shape) + offset
    high = _mix((index >> 32) ^ update_key)
    bits = _mix(_mix((index & 0xFFFFFFFF) ^ high) ^ update_key) & 0xFFFF
    raw = value.view(torch.int32).to(torch.int64) + bits
    cut = (raw & ~0xFFFF).to(torch.int32).view(torch.float32).to(torch.bfloat16)
    return torch.where(value.isfinite(), cut, value.to(torch.bfloat16))
