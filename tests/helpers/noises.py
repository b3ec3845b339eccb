"""Random operators on a state ``y [B, T, D]`` (D is 8), as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

D = 8
Noise = Callable[[Tensor], Tensor]


def _p(y: Tensor) -> Tensor:
    return y.detach().sigmoid()


def _chosen(y: Tensor, replacement: bool) -> Tensor:
    """Entries at drawn places of every row."""
    rows = y.flatten(0, -2)
    picked = torch.multinomial(rows.detach().softmax(-1), 3, replacement)
    return rows.gather(-1, picked).sum(-1).view(y.shape[:-1]).unsqueeze(-1) * y


def _written(y: Tensor) -> Tensor:
    z = y * 1
    z[..., 2:5].uniform_(0, 1)
    return y + z


NOISES: dict[str, Noise] = {
    "rand_like": lambda y: y * torch.rand_like(y),
    "randn_like": lambda y: y + 0.1 * torch.randn_like(y),
    "rand_of_its_shape": lambda y: y * torch.rand(y.shape),
    "rand_of_the_length": lambda y: y * torch.rand(y.shape[1]).unsqueeze(-1),
    "randn_of_the_width": lambda y: y * torch.randn(D),
    "randint_like": lambda y: y * torch.randint_like(y, 2, 7),
    "randint": lambda y: y * torch.randint(3, y.shape),
    "randperm": lambda y: y[..., torch.randperm(D)],
    "bernoulli": lambda y: y * torch.bernoulli(_p(y)),
    "bernoulli_p": lambda y: y * y.detach().bernoulli(0.3),
    "normal": lambda y: torch.normal(torch.zeros_like(y), torch.ones_like(y)) + y,
    "normal_mean": lambda y: y * torch.normal(torch.ones_like(y), 0.5),
    "normal_std": lambda y: y * torch.normal(0.5, torch.ones_like(y)),
    "multinomial": lambda y: _chosen(y, False),
    "multinomial_replaced": lambda y: _chosen(y, True),
    "rrelu": lambda y: F.rrelu(y, training=True),
    "rrelu_in_place": lambda y: F.rrelu(y * 2, training=True, inplace=True),
    "dropout": lambda y: F.dropout(y, 0.5),
    "native_dropout": lambda y: torch.native_dropout(y, 0.5, True)[0],
    "dropout1d": lambda y: F.dropout1d(y, 0.5),
    "dropout2d": lambda y: F.dropout2d(y.unsqueeze(1), 0.5).squeeze(1),
    "dropout3d": lambda y: F.dropout3d(y.view(*y.shape[:2], 2, 2, 2), 0.5).flatten(2),
    "alpha_dropout": lambda y: F.alpha_dropout(y, 0.5, training=True),
    "feature_alpha_dropout": lambda y: F.feature_alpha_dropout(y, 0.5, training=True),
    "gumbel_softmax": lambda y: F.gumbel_softmax(y, tau=0.7),
    "hard_gumbel_softmax": lambda y: y * F.gumbel_softmax(y, hard=True).detach(),
    "exponential_": lambda y: y * torch.empty_like(y).exponential_(0.5),
    "uniform_": lambda y: y * torch.empty_like(y).uniform_(-1, 1),
    "normal_": lambda y: y * torch.zeros_like(y).normal_(),
    "bernoulli_": lambda y: y * torch.empty_like(y).bernoulli_(0.3),
    "bernoulli_of": lambda y: y * torch.empty_like(y).bernoulli_(_p(y)),
    "log_normal_": lambda y: y * torch.empty_like(y).log_normal_(0, 0.2),
    "cauchy_": lambda y: y * torch.empty_like(y).cauchy_(0, 0.1).tanh(),
    "geometric_": lambda y: y * torch.empty_like(y).geometric_(0.6).clamp(max=3),
    "uniform_through_a_view": _written,
    "attention_dropout": lambda y: F.scaled_dot_product_attention(
        y[:, None], y[:, None], y[:, None], dropout_p=0.4
    ).squeeze(1),
    "transposed": lambda y: (torch.rand_like(y.mT) * y.mT).mT,
    "two_draws": lambda y: y * (torch.rand_like(y) - torch.rand_like(y)),
}
