"""Operators without the tag of pointwise ones, and those that torch writes out in others: one
program of all, in which nothing runs whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from double import largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 6, 11


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of ``x`` turned by learned angles that grow with the position."""
    steps = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * angles
    turns = torch.polar(torch.ones_like(steps), steps)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns * turns.conj().mean(-1, keepdim=True)).flatten(-2)


STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, w: turned(x, w[: D // 2]),
    lambda x, w: torch.complex(x, x * w).abs(),
    lambda x, w: torch.complex(x, w.expand_as(x)).conj().imag,
    lambda x, w: x * (x * w).detach().floor_divide(0.5),
    lambda x, w: torch.rsub(x, x.square() * w),
    lambda x, w: F.softshrink(x * w, 0.2) + F.hardshrink(x, 0.3),
    lambda x, w: torch.linalg.cross(x[..., :3] * w[:3], x[..., 3:]).repeat(1, 1, 2),
    lambda x, w: x * torch.aminmax(x * w, dim=-1, keepdim=True).max,
    lambda x, w: x * torch.nansum(x * w, -1, keepdim=True),
    lambda x, w: x * torch.cdist(x, torch.outer(w, w).expand(len(x), -1, -1)).tanh(),
    lambda x, w: x * torch.cdist(x.flatten(0, 1), torch.addr(torch.eye(D), w, w)).view_as(x).cos(),
    lambda x, w: x * torch.addmv(w, torch.outer(w, w), w),
    lambda x, w: x * (x > -9).all((-1,), keepdim=True),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.weights = nn.Parameter(torch.randn(len(STEPS), D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for step, weight in zip(STEPS, self.weights.unbind(), strict=True):
            x = x + 0.3 * torch.tanh(step(F.layer_norm(x, (D,)), weight))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def test_small_operators_stream() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        plain = Net()
        net = copy.deepcopy(plain)
        fxmem.transform(net, Plan(stream=Stream(chunk=3, loss_chunk=3)))
        for n in (7, 12):
            ids = torch.randint(VOCAB, (2, n))
            found = []
            for one in (plain, net):
                one.zero_grad()
                loss = one(ids)
                loss.backward()
                grads = {k: p.grad for k, p in one.named_parameters()}
                found.append({"loss": loss.detach(), **grads})
            assert largest_difference(found[1], found[0])[0] <= 1e-10
    finally:
        torch.set_default_dtype(torch.float32)
    assert [b.op for b in fxmem.explain(net).barriers] == []
