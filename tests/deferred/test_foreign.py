"""Functions that are not recorded: what they are given, and where their gradients go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import VOCAB, D, Layer, ids, same, same_gradients

import fxmem
from fxmem import Plan, Stream

pytestmark = pytest.mark.filterwarnings("ignore::fxmem.errors.FxmemWarning")


class Net(nn.Module):
    """``tied``: the head's weight is the embedding, so the states before the head depend on it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(D, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


class Twice(torch.autograd.Function):
    """Its gradient is not that of what it computes; what it calls may be recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Reads(torch.autograd.Function):
    """It saves its input, of which it has asked nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.zeros(x.shape, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class First(torch.autograd.Function):
    """Of two outputs one may get no gradient, as from DistributedDataParallel's sink."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients


def asked(logits: Tensor) -> Tensor:
    found = logits.logsumexp(-1)
    found.sum().item()
    return Twice.apply(found).square().mean()


def asked_after(logits: Tensor) -> Tensor:
    found = logits.logsumexp(-1)
    loss = Twice.apply(found).square().mean()
    found.sum().item()
    return loss + found.sin().mean()


def asked_meanwhile(logits: Tensor) -> Tensor:
    """Recorded before anybody knows the value that it is made of."""
    found = logits.logsumexp(-1)
    late = found.sin()
    found.sum().item()
    return Twice.apply(late).mean() + Twice.apply(found).mean() + late.mean()


def one_of_two(logits: Tensor) -> Tensor:
    first, _ = First.apply(logits.logsumexp(-1), logits)
    return first.square().mean()


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "wide": lambda x: Twice.apply(x).square().mean(),
    "small": lambda x: Twice.apply(x.logsumexp(-1)).square().mean(),
    "both": lambda x: Twice.apply(x).square().mean() + x.sin().mean(),
    "reads": lambda x: Reads.apply(x.logsumexp(-1)).mean() + x.logsumexp(-1).sum(),
    "two": lambda x: Twice.apply(Twice.apply(x).logsumexp(-1)).mean(),
    "asked": asked, "asked after": asked_after, "asked meanwhile": asked_meanwhile,
    "one of two": one_of_two,
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def twins(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Net(request.param).double()
    return plain, fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=4, loss_chunk=3)))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_plain_logits(twins: tuple[nn.Module, nn.Module], way: str) -> None:
    losses = []
    for net in twins:
        net.zero_grad()
        losses.append(WAYS[way](net(ids())))
        losses[-1].backward()
    same(losses[1].detach(), losses[0].detach())
    same_gradients(twins[1], twins[0])


def test_what_gets_no_gradient_computes_none(twins: tuple[nn.Module, nn.Module]) -> None:
    for net in twins:
        net.zero_grad()
        used, _ = First.apply(next(net.parameters()).sum(), net(ids()))
        used.backward()
    same_gradients(twins[1], twins[0])
    assert next(twins[1].layers.parameters()).grad is None  # type: ignore[union-attr]


def test_another_model_reads_the_values(twins: tuple[nn.Module, nn.Module]) -> None:
    """As one that judges what the first has said; both stream, and both get gradients."""
    judges = [nn.Sequential(nn.Linear(VOCAB, D), Layer(), nn.Linear(D, 1)).double()]
    judges.append(fxmem.transform(copy.deepcopy(judges[0]), Plan(stream=Stream(chunk=4))))
    for _ in range(2):
        losses = []
        for net, judge in zip(twins, judges, strict=True):
            net.zero_grad()
            judge.zero_grad()
            losses.append(judge(net(ids()).softmax(-1)).square().mean())
            losses[-1].backward()
        same(losses[1].detach(), losses[0].detach())
        same_gradients(twins[1], twins[0])
        same_gradients(judges[1], judges[0])
    assert fxmem.explain(judges[1]).executed_bodies > 0
