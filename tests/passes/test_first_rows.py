"""Shifts whose first rows the model sets itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 6, 11


class Net(nn.Module):
    """Each token is mixed with the one ``rows`` before; the first have learned ones."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.embed, self.mix = nn.Embedding(VOCAB, D), nn.Linear(D, D)
        self.start, self.head = nn.Parameter(torch.randn(1, rows, D)), nn.Linear(2 * D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embed(ids)))
        start = self.mix(self.start).expand(len(x), -1, -1)
        before = torch.cat([start, x[:, : -self.rows]], dim=1)
        scores = self.head(torch.cat([x, before], -1))
        return F.cross_entropy(scores.flatten(0, 1), ids.flatten())


@pytest.mark.parametrize(("rows", "chunk"), [(1, 3), (3, 2)])
def test_learned_first_rows(rows: int, chunk: int) -> None:
    torch.manual_seed(0)
    plain = Net(rows).double()
    net = copy.deepcopy(plain)
    fxmem.transform(net, Plan(stream=Stream(chunk=chunk, loss_chunk=chunk)))
    for n in (7, 12):
        ids = torch.randint(VOCAB, (2, n))
        found = []
        for one in (plain, net):
            one.zero_grad()
            loss = one(ids)
            loss.backward()
            found.append({"loss": loss.detach(), **{k: p.grad for k, p in one.named_parameters()}})
        assert largest_difference(found[1], found[0])[0] <= 1e-10
    assert not fxmem.explain(net).barriers
