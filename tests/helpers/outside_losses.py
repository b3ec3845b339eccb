"""Losses that users compute from a model's logits, and a batch for them."""

from __future__ import annotations

from collections.abc import Callable

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

Data = dict[str, Tensor]
Loss = Callable[[Tensor, Data], Tensor]


def cross_entropy(logits: Tensor, data: Data) -> Tensor:
    shifted = logits[..., :-1, :].contiguous().view(-1, logits.size(-1))
    return F.cross_entropy(shifted, data["labels"][..., 1:].reshape(-1))


def smoothed(logits: Tensor, data: Data) -> Tensor:
    loss: Tensor = LabelSmoother(0.1)({"logits": logits}, data["labels"], shift_labels=True)
    return loss


def log_probs(logits: Tensor, data: Data) -> Tensor:
    """Of every next token, as preference objectives take them; ``[B, T - 1]``."""
    labels = data["labels"][:, 1:].clone()
    mask = labels != -100
    labels[~mask] = 0
    picked = torch.gather(logits[:, :-1].log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    return picked * mask


def dpo(logits: Tensor, data: Data) -> Tensor:
    s = log_probs(logits, data).sum(-1)
    half = len(s) // 2
    chosen, rejected = s[:half], s[half:]
    gain = (chosen - data["reference"][:half]) - (rejected - data["reference"][half:])
    return -F.logsigmoid(0.1 * gain).mean()


def halves_of_logits(logits: Tensor, data: Data) -> Tensor:
    half = logits.shape[0] // 2
    chosen = {**data, "labels": data["labels"][:half]}
    rejected = {**data, "labels": data["labels"][half:]}
    a = log_probs(logits[:half], chosen).sum(-1)
    b = log_probs(logits[half:], rejected).sum(-1)
    return -F.logsigmoid(0.1 * (a - b)).mean() + logits[:half].mean() * 1e-3


def orpo(logits: Tensor, data: Data) -> Tensor:
    a = log_probs(logits, data).sum(-1) / (data["labels"][:, 1:] != -100).sum(-1)
    half, odds = len(a) // 2, a - torch.log1p(-torch.exp(a))
    return -a[:half].mean() - F.logsigmoid(odds[:half] - odds[half:]).mean()


def grpo(logits: Tensor, data: Data) -> Tensor:
    """On the completion's tokens, by TRL's ``selective_log_softmax`` with a temperature."""
    keep = logits.shape[1] - 5
    logits = logits[:, :-1, :]
    logits = logits[:, -keep:, :]
    logits.div_(0.9)
    ids = data["ids"][:, -keep:]
    picked = torch.gather(logits, dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
    lp = picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    with torch.no_grad():
        p = logits.softmax(-1)
        data["entropy"] = (logits.logsumexp(-1) - (p * logits).sum(-1)).mean()
    ratio = torch.exp(lp - lp.detach())
    gain = data["reference"].unsqueeze(1)
    low = torch.min(ratio * gain, torch.clamp(ratio, 0.8, 1.2) * gain)
    return -low.mean()


def distillation(logits: Tensor, data: Data) -> Tensor:
    student = (logits / 2.0).log_softmax(-1)
    return F.kl_div(student, data["teacher"], reduction="batchmean", log_target=True) * 4.0


def answers(logits: Tensor, data: Data) -> Tensor:
    """Cross-entropy of the tokens of a mask alone."""
    mask = data["labels"][:, 1:] % 3 == 0
    return F.cross_entropy(logits[:, :-1][mask], data["labels"][:, 1:][mask])


def divergence_of_answers(logits: Tensor, data: Data) -> Tensor:
    """Jensen and Shannon's, with a mixture, of what a mask leaves, as TRL distils."""
    student, teacher = (logits / 0.9).log_softmax(-1), data["teacher"]
    half = torch.tensor(0.5, dtype=student.dtype).log()
    mixture = torch.logsumexp(torch.stack([student + half, teacher + half]), dim=0)
    both = [F.kl_div(mixture, p, reduction="none", log_target=True) for p in (student, teacher)]
    mask = data["labels"] % 2 == 0
    return (0.5 * both[0] + 0.5 * both[1])[mask].sum() / mask.sum()


LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        cross_entropy, smoothed, dpo, halves_of_logits, orpo, grpo, distillation, answers,
        divergence_of_answers,
    )
}  # fmt: skip


def batch(
    length: int, vocab: int = tiny.VOCAB, dtype: torch.dtype = torch.float64, count: int = 4
) -> Data:
    """``count`` sequences; ``dtype`` of what losses compare with."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vocab, (count, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    reference = torch.randn(count, generator=generator).to(dtype)
    teacher = torch.randn(count, length, vocab, generator=generator).to(dtype).log_softmax(-1)
    return {"ids": ids, "labels": labels, "reference": reference, "teacher": teacher}
