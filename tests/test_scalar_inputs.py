"""Floats that Dynamo makes symbolic: coefficients stay inputs, numbers that ops need are fixed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.compiled import COUNTER

PLAN = Plan(stream=Stream(chunk=5, loss_chunk=5))
Objective = Callable[[Tensor, Tensor, float], Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.head = nn.Embedding(17, 8), nn.LayerNorm(8), nn.Linear(8, 17)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.norm(self.table(ids))))
        return logits


def weighted(logits: Tensor, ids: Tensor, beta: float) -> Tensor:
    nll = F.cross_entropy(logits.transpose(1, 2), ids)
    return beta * nll + (1.0 - beta) * logits.square().mean() + (logits * beta).exp().mean()


def as_epsilon(logits: Tensor, ids: Tensor, beta: float) -> Tensor:
    return F.layer_norm(logits, (17,), eps=beta).square().mean() + logits.square().mean() * beta


def with_a_size(logits: Tensor, ids: Tensor, beta: float) -> Tensor:
    return logits.square().sum() * (beta / ids.shape[1]) + logits.mean() * beta


def step(net: nn.Module, call: Callable[[Tensor, float], Tensor], ids: Tensor, beta: float):
    net.zero_grad()
    loss = call(ids, beta)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("objective", "captures"), [(weighted, 2), (as_epsilon, 4), (with_a_size, 4)]
)
def test_a_coefficient_may_change_from_step_to_step(objective: Objective, captures: int) -> None:
    net, ids = Net().double(), torch.randint(17, (2, 13))

    def loss(ids: Tensor, beta: float) -> Tensor:
        return objective(net(ids), ids, beta)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=fxmem.backend(PLAN))
    before = COUNTER.captures
    for beta in (0.1, 0.2, 0.5, 0.7):
        got, want = step(net, compiled, ids, beta), step(net, loss, ids, beta)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert COUNTER.captures - before == captures


def test_a_model_compiled_with_everything_dynamic() -> None:
    net, ids = tiny.model().double(), torch.randint(tiny.VOCAB, (2, 19))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=fxmem.backend(PLAN), dynamic=True)

    def loss(model: nn.Module) -> list[Tensor]:
        net.zero_grad()
        out = model(input_ids=ids, use_cache=False).logits.square().mean()
        out.backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    for a, b in zip(loss(compiled), loss(net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
