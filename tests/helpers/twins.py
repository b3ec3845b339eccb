"""A tiny model with tied weights and several outputs, its plain twin, and how to compare them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 8, 11
PLAN = Plan(stream=Stream(chunk=4, loss_chunk=3, logits="keep"))


class Layer(nn.Module):
    """Causal attention and an MLP around a residual stream ``[B, T, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.drop = nn.Dropout(0.0)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        q = self.mix(self.norm(x)).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1) * self.scale
        return x + self.drop(self.down(F.silu(self.up(x))))


class Net(nn.Module):
    """``ids [B, T] -> loss, aux, hidden [B, T, D], pooled [B, D]``; the head is the embedding, and
    ``shift`` is added to it transposed, so that two gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm, self.pooler = nn.LayerNorm(D), nn.Linear(D, D)
        self.shift = nn.Parameter(torch.randn(D, VOCAB) * 0.1)
        self.bias, self.offset = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(1))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        hidden = self.norm(x)
        logits = F.linear(hidden, self.embed.weight + self.shift.t())
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return {
            "loss": loss + self.bias + self.offset.sum(), "aux": hidden.square().mean(),
            "hidden": hidden, "pooled": torch.tanh(self.pooler(hidden[:, 0])),
        }  # fmt: skip


def pair(model: nn.Module | None = None, plan: Plan = PLAN) -> tuple[nn.Module, nn.Module]:
    """A plain model in float64 and its streamed twin."""
    torch.manual_seed(0)
    plain = (model or Net()).double()
    return plain, fxmem.transform(copy.deepcopy(plain), plan)


def ids(batch: int = 2, length: int = 13, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, length), generator=generator)


def same(got: Any, want: Any, where: str = "") -> None:
    """Equal to 1e-10 relative to the largest element; None only where None is wanted."""
    assert (got is None) == (want is None), f"{where}: {got is None} where plain {want is None}"
    if want is not None:
        scale = want.detach().abs().max().clamp(min=1e-6)
        assert got.shape == want.shape, where
        error = ((got.detach() - want.detach()).abs().max() / scale).item()
        assert error <= 1e-10, f"{where}: {error}"


def same_gradients(got: nn.Module, want: nn.Module) -> None:
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        same(p.grad, q.grad, name)


def step(net: nn.Module, seed: int = 0) -> Tensor:
    net.zero_grad()
    loss = net(ids(seed=seed))["loss"]
    loss.backward()
    return loss.detach()


def agree(models: tuple[nn.Module, nn.Module]) -> None:
    want, got = (step(net) for net in models)
    same(got, want, "loss")
    same_gradients(models[1], models[0])


def some(first: list[Any], others: list[Any]) -> Any:
    """All of them as tests, the others only where there is time: each costs a capture or two."""
    return pytest.mark.parametrize(
        "change", [*first, *(pytest.param(f, marks=pytest.mark.slow) for f in others)],
        ids=[f.__name__ for f in (*first, *others)],
    )  # fmt: skip
