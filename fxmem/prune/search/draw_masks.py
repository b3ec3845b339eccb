"""Masks drawn from seeds, and masks nested in wider ones.

A sub-model is built from a wide mask, in which every unit's odds are `widen` times what the search
asks for. Inside it every step draws a mask of its own by closing gates on activations, which costs
no slicing. Both draws together are the product-Bernoulli law that is asked for, so each step's mask
is one of that law; masks of one sub-model share only what the wide mask left out. Ours, not the
paper's: without it all steps of a snapshot measure the same K masks, and only the noise of the data
averages out.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw(s: Tensor, seed: int, snapshot: int, sample: int, step: int | None = None) -> Tensor:
    """A mask, bool (n,), with probabilities `s`: the same for every number of ranks.

    Args:
        s: keep probability of each unit, float64 (n,).
        seed: of the search. snapshot, sample: which of its sub-models.
        step: of the snapshot, for masks inside a sub-model.
    """
    text = f"{seed}/{snapshot}/{sample}" + ("" if step is None else f"/{step}")
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    )
    return torch.rand(len(s), generator=generator, dtype=torch.float64) < s


def widened(s: Tensor, factor: float) -> Tensor:
    """Probabilities whose odds are `factor` times those of `s`: float64 (n,)."""
    return factor * s / (1 + (factor - 1) * s)


def nested(
    wide: Tensor, masks: Tensor, s: Tensor, seed: int, snapshot: int, step: int
) -> tuple[Tensor, Tensor]:
    """Masks inside wide ones, and the probabilities that both draws together have.

    Args:
        wide: probabilities that `masks` were drawn with, float64 (n,).
        masks: bool (K, n).
        s: wanted probabilities (n,); those above `wide` cannot be had and stay at `wide`.
        step: of the snapshot.

    Returns:
        bool (K, n) and float64 (n,).
    """
    law = torch.minimum(s, wide)
    inside = torch.where(wide > 0, law / wide, 1.0)
    rows = [mask & draw(inside, seed, snapshot, k, step) for k, mask in enumerate(masks)]
    return torch.stack(rows), law
