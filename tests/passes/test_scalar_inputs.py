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
from fxmem.runtime.counters import COUNTER

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


READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "count": lambda y, ids: y.square().sum() / (ids > 4).sum().item(),
    "bounded": lambda y, ids: y.square().sum() / max((ids > 4).sum().item(), 3),
    "mean": lambda y, ids: y.square().sum() * float(ids.double().mean().item()),
    "learned": lambda y, ids: y.square().sum() / y.abs().max().item(),
    "combined": lambda y, ids: (y * (1.0 - 2 * ids[0, 0].item())).square().sum(),
    "reciprocal": lambda y, ids: (y * (1 / (ids > 4).sum().item())).square().sum(),
    "listed": lambda y, ids: y.square().sum() / (1 + ids[0].tolist()[0]),
    "of_every_row": lambda y, ids: (y / (1 + y[:, -1, 0].sum().item() ** 2)).square().sum(),
}
"""Numbers that are read from tensors, as losses are normalised by them."""


@pytest.mark.parametrize("name", sorted(READ))
def test_a_number_that_is_read_from_a_tensor(name: str) -> None:
    class Model(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return READ[name](super().forward(ids), ids)

    net, streamed = Model().double(), Model().double()
    fxmem.transform(streamed, PLAN)
    for length in (13, 17):
        ids = torch.randint(17, (2, length))
        want, got = (step(n, lambda i, _: n(i), ids, 0.0) for n in (net, streamed))  # noqa: B023
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (lambda y, ids: y[:, : ids.max().item()].sum(), "depends on the values"),
        (lambda y, ids: F.layer_norm(y, (17,), eps=ids.double().mean().item()).sum(), "layer_norm"),
        (lambda y, ids: y[ids > 4].square().sum(), "depends on the values"),
    ],
)
def test_what_needs_the_number_itself_is_refused(use: Callable[..., Tensor], line: str) -> None:
    class Model(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return use(super().forward(ids), ids)

    net = Model()
    # a budget holds for one graph only, so the model is not captured in parts
    fxmem.transform(net, Plan(stream=Stream(memory="1GB")))
    with pytest.raises(fxmem.errors.CaptureError, match=line) as raised:
        net(torch.randint(17, (2, 13)))
    assert "test_scalar_inputs.py" in str(raised.value)
