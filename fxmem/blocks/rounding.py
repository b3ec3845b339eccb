"""Stochastic rounding to bfloat16 without generator state.

The bits of an element depend on its key and global index alone, so any chunking or sharding gives
equal results, and so does the kernel that updates a weight in place, bit for bit.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fxmem.kernels import stochastic


def key(seed: int, name: str, step: int, micro: int = 0) -> int:
    """A 31-bit key of one update of one parameter, the same in every process."""
    text = f"{seed}/{name}/{step}/{micro}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") & 0x7FFFFFFF


def stochastic_round(value: Tensor, update_key: int, offset: int = 0) -> Tensor:
    """Round float32 `value` to bfloat16; `offset` is the global index of its first element.

    Non-finite elements are cast unchanged.
    """
    index = torch.arange(value.numel(), device=value.device).view(value.shape) + offset
    return stochastic.round_to(value, torch.bfloat16, index, update_key)
