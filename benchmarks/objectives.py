"""The objectives, as a user writes them: one loss function each, over a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.trainer_pt_utils import LabelSmoother

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def sft(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, taken by the model itself."""
    loss: torch.Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    return loss


def dpo(model: Any, ids_2T: torch.Tensor) -> torch.Tensor:
    """Preference of row 0 over row 1; the reference's log-probabilities cancel here."""
    score_2 = token_log_probs(model, ids_2T).sum(-1)
    return -F.logsigmoid(0.1 * (score_2[0] - score_2[1]))


def cross_entropy(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """:func:`sft` from logits that leave the model."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())


def smoothed(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Label smoothing as transformers' Trainer does it."""
    output = model(input_ids=ids_BT, use_cache=False)
    smoother = LabelSmoother(epsilon=0.1)
    loss: torch.Tensor = smoother(output, ids_BT, shift_labels=True)
    return loss


def orpo(model: Any, ids_2T: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of row 0, and the odds of row 0 against row 1."""
    mean_2 = token_log_probs(model, ids_2T).mean(-1)
    odds_2 = mean_2 - torch.log1p(-torch.exp(mean_2))
    return -mean_2[0] - 0.1 * F.logsigmoid(odds_2[0] - odds_2[1])


def distillation(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Divergence from a teacher whose eight likeliest tokens are known."""
    logp_BTV = model(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
    shift_8 = torch.arange(8)
    likely_BT8 = (ids_BT[..., None] + shift_8) % logp_BTV.shape[-1]
    teacher_8 = torch.softmax(-shift_8.float(), -1)
    return (teacher_8 * (teacher_8.log() - logp_BTV.gather(-1, likely_BT8))).sum(-1).mean()


def ppo(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """:func:`grpo` with a bonus for entropy."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    logp_BTV = logits_BTV.log_softmax(-1)
    entropy = -(logp_BTV.exp() * logp_BTV).sum(-1).mean()
    logp_BT = logp_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    return clipped(logp_BT) - 0.01 * entropy


def grpo(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Clipped policy ratio per token against fixed advantages."""
    return clipped(token_log_probs(model, ids_BT))


def clipped(logp_BT: torch.Tensor) -> torch.Tensor:
    """The clipped ratio to the policy as it is, [B, T] to a number."""
    advantage_BT = advantages(logp_BT.shape)
    ratio_BT = torch.exp(logp_BT - logp_BT.detach())
    clipped_BT = ratio_BT.clamp(0.8, 1.2)
    return -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT).mean()


def token_log_probs(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """log p(token | tokens before it), [B, T - 1], in float32."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    picked: torch.Tensor = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])
    return picked.squeeze(-1)


def advantages(shape: torch.Size) -> torch.Tensor:
    """Noise of zero mean that is the same in every process, without a random generator."""
    position = torch.arange(shape.numel(), dtype=torch.float32).reshape(shape)
    return torch.sin(position * 12.9898) * 1.4


OBJECTIVES: dict[str, tuple[Loss, int]] = {"sft": (sft, 1), "dpo": (dpo, 2), "grpo": (grpo, 1)}
"""Loss and number of rows; a benchmark length counts the tokens of all rows."""

OUTSIDE: dict[str, tuple[Loss, int]] = {
    "cross-entropy": (cross_entropy, 1), "smoothed": (smoothed, 1), "dpo": (dpo, 2),
    "orpo": (orpo, 2), "grpo": (grpo, 1), "ppo": (ppo, 1), "distillation": (distillation, 1),
}  # fmt: skip
"""Losses of logits that have left the model."""

ALL = OBJECTIVES | OUTSIDE
