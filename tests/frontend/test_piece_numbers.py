"""Pieces that are given numbers which values of the call decide."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 8, 11


class Either(nn.Module):
    """A branch on what it is given: a piece."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor, marked: bool, more: bool) -> Tensor:
        if marked and not more:
            return x + self.inner(x).tanh()
        return x - self.inner(x)


class Model(nn.Module):
    """``deep``: a number is made of what stands behind a piece."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.deep = deep
        self.embed, self.mlp, self.head = (
            nn.Embedding(VOCAB, D), nn.Linear(D, D), nn.Linear(D, VOCAB),
        )  # fmt: skip
        self.first, self.second = Either(), Either()

    def forward(self, ids: Tensor) -> Tensor:
        marked = (ids == 3).any().item()
        x = self.first(self.embed(ids), marked, False)
        x = x + self.mlp(x).tanh()
        last = (x.mean(-1) > 9).any() if self.deep else (ids == 4).all()
        x = self.second(x, marked, last.item())
        return fn.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")  # that parts are whole
def test_a_number_is_made_where_it_is_asked_for(deep: bool) -> None:
    net = Model(deep).double()
    plain = copy.deepcopy(net)
    fxmem.transform(net, Plan(stream=Stream(chunk=5, loss_chunk=4)))
    for length, low in ((13, 0), (17, 4), (14, 0)):
        ids = torch.randint(low, VOCAB, (2, length))
        ids[0, 0] = max(low, 3)
        for model in (net, plain):
            model.zero_grad()
            model(ids).backward()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert math.isclose((p.grad - q.grad).abs().max().item(), 0, abs_tol=1e-12)
    report = fxmem.explain(net)
    assert [p.name for p in report.pieces] == ["first", "second"]
    assert report.executed_bodies and not report.in_parts
