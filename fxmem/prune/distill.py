"""Losses of a student beside its teacher: the next-token distributions, and hidden states.

The teacher runs without gradients and, transformed, in chunks: of its logits only the largest of
every token and one sum over the vocabulary stay, so tokens times vocabulary are never held at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import PlanError
from fxmem.frontend.inputs import without_cache
from fxmem.prune.shrink.gated_submodel import on

SMALLEST = 1e-6
"""Least probability of all tokens outside the largest together: its logarithm stays finite."""


class Teacher:
    """What a student learns from: a model that runs without gradients.

    Args:
        model: of the student's vocabulary; transformed, it runs in chunks.
        top_k: logits per token that are kept.
        temperature: both models' logits are divided by it.
        hidden: weight of the hidden states' distance, 0 for none.
    """

    def __init__(
        self, model: nn.Module, top_k: int = 64, temperature: float = 1.0, hidden: float = 0.0
    ) -> None:
        self.model, self.top_k, self.temperature, self.hidden = model, top_k, temperature, hidden
        self.device = next(model.parameters()).device

    def loss(self, student: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Mean over tokens of the divergence from the teacher, where ``attention_mask`` is not 0;
        scalar. Labels are not read.

        The divergence is Kullback and Leibler's from the teacher's distribution over its `top_k`
        tokens and all others as one, times the square of the temperature; hidden states add the
        mean squared distance over the teacher's mean square, averaged over layers.

        Raises:
            PlanError: the models have different vocabularies, or hidden states of other widths.
        """
        given = {k: v for k, v in batch.items() if k != "labels"}
        if self.hidden:
            given["output_hidden_states"] = True
        device = next(student.parameters()).device
        with torch.no_grad():
            taught = self.model(**without_cache(self.model, on(self.device, given)))
            tokens, known = self._largest(taught.logits, device)
        out = student(**without_cache(student, on(device, given)))
        if out.logits.shape[-1] != taught.logits.shape[-1]:
            raise PlanError(
                f"the student's vocabulary has {out.logits.shape[-1]} tokens, the teacher's "
                f"{taught.logits.shape[-1]}", advice="give the dense model that it was made from",
            )  # fmt: skip
        own = (out.logits / self.temperature).log_softmax(-1).gather(-1, tokens)
        each = _divergence(known, own)
        weight = torch.ones_like(each)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == each.shape:
            weight = mask.to(device, each.dtype)
        loss = (each * weight).sum() / weight.sum().clamp_min(1) * self.temperature**2
        if self.hidden:
            loss = loss + self.hidden * _distance(out.hidden_states, taught.hidden_states)
        return loss

    def _largest(self, logits: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities of the largest logits, each ``[batch, length, top_k]``."""
        scaled = logits / self.temperature
        values, ids = scaled.topk(min(self.top_k, logits.shape[-1]), -1)
        known = values - scaled.logsumexp(-1, keepdim=True)
        return ids.to(device), known.to(device)


def _divergence(known: Tensor, own: Tensor) -> Tensor:
    """``[batch, length]`` from log-probabilities ``[batch, length, top_k]``."""
    rest, missing = (
        (1 - x.exp().sum(-1)).clamp_min(SMALLEST) for x in (known, own)
    )  # of all other tokens
    inside = (known.exp() * (known - own)).sum(-1)
    return inside + rest * (rest.log() - missing.log())


def _distance(own: tuple[Tensor, ...], taught: tuple[Tensor, ...]) -> Tensor:
    if [x.shape for x in own] != [x.shape for x in taught]:
        raise PlanError(
            "the student's hidden states have another shape than the teacher's",
            advice="hidden=0 for a student of another width",
        )
    # the embedding's are the same, and nothing before them learns
    pairs = list(zip(own, taught, strict=True))[1:]
    parts = [
        (x - t.to(x)).square().mean() / t.to(x).square().mean().clamp_min(1e-30) for x, t in pairs
    ]
    return torch.stack(parts).mean()


__all__ = ["Teacher"]
