"""The objectives, as a user writes them: one loss function each, over a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def sft(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, taken by the model itself."""
    loss: torch.Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    return loss


def dpo(model: Any, ids_2T: torch.Tensor) -> torch.Tensor:
    """Preference of row 0 over row 1; the reference's log-probabilities cancel here."""
    score_2 = token_log_probs(model, ids_2T).sum(-1)
    return -F.logsigmoid(0.1 * (score_2[0] - score_2[1]))


def grpo(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Clipped policy ratio per token against fixed advantages."""
    logp_BT = token_log_probs(model, ids_BT)
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
