"""What forward and backward of chunk attention are told besides tensors: the mask as structure.

Letters: B batch, H query heads, G key/value heads (H = n G), C query rows, S keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """Query row ``c`` stands at key position ``c + offset``. It sees key ``s`` where

    - ``causal``: ``s <= c + offset``;
    - ``window`` > 0: ``s > c + offset - window``;
    - segments ``[B, C]`` and ``[B, S]`` of integers are given: ``q_segment[b, c] == k_segment[b,
      s]``;
    - ``k_valid [B, S]`` is given: it holds;
    - ``mask`` ``[B|1, H|1, C|1, S]`` is given: bool, it holds; additive, it is added to the scores.

    Scores are multiplied by ``scale``; ``softcap`` > 0 replaces a score x by ``softcap tanh(x /
    softcap)`` (Gemma 2); ``sinks [H]`` are scores of a key without a value (GPT-OSS).
    """

    scale: float
    offset: int = 0
    causal: bool = True
    window: int = 0
    q_segment: Tensor | None = None
    k_segment: Tensor | None = None
    k_valid: Tensor | None = None
    mask: Tensor | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, C, S]`` in float32 (or float64), ``-inf`` where hidden; for references only."""
        x = self.raw_scores(q, k)
        if self.softcap:
            x = self.softcap * torch.tanh(x / self.softcap)
        seen = self._visible(q, k)
        if self.mask is not None and self.mask.dtype == torch.bool:
            seen = seen & self.mask
        elif self.mask is not None:
            x = x + self.mask
        return x.masked_fill(~seen, -math.inf)

    def raw_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Before softcap and mask."""
        wide = torch.promote_types(q.dtype, torch.float32)
        k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return q.to(wide) @ k.transpose(-1, -2) * self.scale

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        """The structured part of the mask, bool ``[B|1, 1, C, S]``."""
        at = torch.arange(q.shape[2], device=q.device)[:, None] + self.offset
        keys = torch.arange(k.shape[2], device=q.device)
        seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        if self.causal:
            seen = seen & (keys <= at)
        if self.window:
            seen = seen & (keys > at - self.window)
        if self.q_segment is not None and self.k_segment is not None:
            seen = seen & (self.q_segment[:, None, :, None] == self.k_segment[:, None, None, :])
        return seen if self.k_valid is None else seen & self.k_valid[:, None, None, :].bool()

    def arguments(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """Kernel arguments; the mask expanded to ``[B, H, C, S]``, broadcast by strides of 0."""
        tables = {"QSEG": self.q_segment, "KSEG": self.k_segment, "VALID": self.k_valid}
        mask = self.mask
        full = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        return {
            **{name: None if x is None else x.contiguous() for name, x in tables.items()},
            "MASK": mask,
            **strides("mask_b mask_h mask_c mask_s", full),
            "offset": self.offset, "window": self.window, "scale": self.scale,
            "softcap": float(self.softcap),
            "CAUSAL": bool(self.causal), "WINDOW": self.window > 0, "SOFTCAP": self.softcap > 0,
            "ADDITIVE": mask is not None and mask.dtype != torch.bool,
        }  # fmt: skip


def strides(names: str, x: Tensor | None) -> dict[str, int]:
    """The first strides of ``x`` by name, all 0 for None."""
    split = names.split()
    return dict(zip(split, [0] * len(split) if x is None else x.stride(), strict=False))


WIDE, PART = 128, 32


def parts(q: Tensor, f: int) -> int:
    """How many columns of a head a program reads and makes at a time, 0 for all: float32 heads
    above ``WIDE`` do not fit in registers.
    """
    return PART if q.dtype == torch.float32 and max(q.shape[-1], f) > WIDE else 0
