"""Modules of classes that Dynamo does not take at all, called by the model beside others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem

D = 8


class Disabled(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return torch.tanh(self.linear(x)), 1.0


class Net(nn.Module):
    """``many``: several of them, in a list."""

    def __init__(self, kind: Any, many: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, D), nn.Linear(D, 11)
        self.steps = nn.ModuleList(kind(D, D, batch_first=True) for _ in range(1 + many))
        self.mix, self.norm = nn.Linear(D, 3 * D), nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for step in self.steps:
            q, k, v = self.mix(step(self.norm(x))[0]).unsqueeze(1).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN, Disabled])
def test_it_runs_whole_and_the_rest_streams(kind: Any, many: bool) -> None:
    torch.manual_seed(0)
    plain = Net(kind, many).double()
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=5, loss_chunk=4))
    streamed = fxmem.transform(copy.deepcopy(plain), plan)
    for length in (13, 9):
        ids = torch.randint(11, (2, length), generator=torch.Generator().manual_seed(length))
        for net in (streamed, plain):
            net.zero_grad()
            net(ids).backward()
        for (name, p), q in zip(streamed.named_parameters(), plain.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None, name
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    report = fxmem.explain(streamed)
    assert [p.name for p in report.pieces] == [f"steps.{i}" for i in range(1 + many)]
    assert not report.barriers and type(streamed.steps[0]) is kind  # type: ignore[index]
