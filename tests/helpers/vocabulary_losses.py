"""Objectives that people write, of states ``[B, T, D]``, logits ``[B, T, V]`` and ids."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of states, logits and ids: a number, or a vector whose mean is meant."""


def _picked(z: Tensor, ids: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def _ce(z: Tensor, ids: Tensor, **more: object) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), ids.flatten(), **more)  # type: ignore[arg-type]


def _fixed(x: Tensor) -> Tensor:
    """Numbers of the shape of ``x`` that depend on nothing."""
    return torch.arange(x.shape[-1], dtype=x.dtype).cos().expand(x.shape)


def _contrast(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(a @ b.mT / 0.3, torch.arange(a.shape[0]))


def _clipped(x: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    lp = _picked(z, ids)
    ratio, gain = torch.exp(lp - lp.detach() * 0.9), (ids % 3 - 1).to(lp.dtype)
    return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()


def _halves(x: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    a, b = _picked(z, ids)[:, : z.shape[1] // 2].sum(1), _picked(z, ids).sum(1)
    return -F.logsigmoid(0.1 * (b - a))


def _divergence(x: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    p, q = z.softmax(-1), _fixed(z).softmax(-1)
    m = (0.5 * (p + q)).log()
    return F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean")


def _decorrelated(x: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    y = x.flatten(0, 1) - x.flatten(0, 1).mean(0)
    gram = y.mT @ y / y.shape[0]
    return gram.square().sum() - gram.diagonal().square().sum() + F.relu(1 - y.std(0)).mean()


LOSSES: dict[str, Loss] = {
    "tokens": lambda x, z, ids: _ce(z, ids),
    "summed": lambda x, z, ids: _ce(z, ids, reduction="sum"),
    "next": lambda x, z, ids: _ce(z[:, :-1], ids[:, 1:]),
    "ignored": lambda x, z, ids: _ce(z, ids.masked_fill(ids > 6, -100)),
    "smoothed": lambda x, z, ids: _ce(z, ids, label_smoothing=0.1),
    "weighted_classes": lambda x, z, ids: _ce(z, ids, weight=1.5 + _fixed(z[0, 0])),
    "weighted_tokens": lambda x, z, ids: _ce(z, ids, reduction="none") * (ids.flatten() % 3),
    "probabilities": lambda x, z, ids: F.cross_entropy(
        z.flatten(0, 1), _fixed(z).softmax(-1).flatten(0, 1)
    ),
    "z_loss": lambda x, z, ids: _ce(z, ids) + 1e-2 * z.logsumexp(-1).square().mean(),
    "focal": lambda x, z, ids: -((1 - _picked(z, ids).exp()) ** 2 * _picked(z, ids)).mean(),
    "unlikely": lambda x, z, ids: -torch.log1p(-_picked(z, ids).exp().clamp(max=0.999)).mean(),
    "entropy": lambda x, z, ids: _ce(z, ids) + (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "preference": lambda x, z, ids: -F.logsigmoid(0.3 * _picked(z, ids).sum(1)),
    "halves": _halves, "clipped": _clipped, "divergence": _divergence,
    "odds": lambda x, z, ids: -(
        (lp := _picked(z, ids).mean(1)) - torch.log1p(-torch.exp(lp))
    ),
    "distilled": lambda x, z, ids: F.kl_div(
        (z / 2).log_softmax(-1), _fixed(z).log_softmax(-1), reduction="batchmean", log_target=True
    ),
    "reversed": lambda x, z, ids: (
        z.softmax(-1) * (z.log_softmax(-1) - _fixed(z).log_softmax(-1))
    ).sum(-1),
    "hinge": lambda x, z, ids: F.multi_margin_loss(z.flatten(0, 1), ids.flatten()),
    "labels": lambda x, z, ids: F.binary_cross_entropy_with_logits(
        z, F.one_hot(ids, z.shape[-1]).to(z.dtype)
    ),
    "margin_of_two": lambda x, z, ids: F.relu(1 - torch.diff(z.topk(2).values).neg()).mean(),
    "two_ahead": lambda x, z, ids: _ce(z[:, :-1], ids[:, 1:]) + _ce(z[:, :-2], ids[:, 2:]),
    "classified": lambda x, z, ids: F.cross_entropy(z.mean(1), ids[:, 0]),
    "last": lambda x, z, ids: F.cross_entropy(z[:, -1], ids[:, -1]),
    "squares": lambda x, z, ids: x.square().mean(),
    "huber": lambda x, z, ids: F.huber_loss(x, _fixed(x)),
    "values": lambda x, z, ids: _ce(z, ids) + (x[..., 0] - ids / 7).square().mean(),
    "gaussian": lambda x, z, ids: (
        z[..., :8] + (x - _fixed(x)).square() / z[..., :8].exp()
    ).mean() / 2,
    "cosine": lambda x, z, ids: F.cosine_embedding_loss(
        x.flatten(0, 1), _fixed(x).flatten(0, 1), ids.flatten() % 2 * 2 - 1, margin=0.1
    ),
    "triplet": lambda x, z, ids: F.triplet_margin_loss(x, _fixed(x), x.flip(-1)),
    "ranked": lambda x, z, ids: F.margin_ranking_loss(
        x[..., 0], x[..., 1], torch.ones_like(x[..., 0]), margin=0.2
    ),
    "sequences": lambda x, z, ids: _contrast(F.normalize(x.mean(1), dim=-1), x[:, -1]),
    "in_the_batch": lambda x, z, ids: _contrast(
        F.normalize(x.flatten(0, 1), dim=-1), F.normalize(z[..., :8].flatten(0, 1), dim=-1)
    ),
    "decorrelated": _decorrelated,
}  # fmt: skip
