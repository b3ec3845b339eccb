"""Loops over the length in plain PyTorch, inside functions that take a state and give one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 6, 11


def decay(x: Tensor, keep: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    state = torch.zeros_like(x[:, 0]) if state is None else state
    rows = []
    for t in range(x.shape[1]):
        state = keep * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1), state


def softmax_so_far(
    x: Tensor, state: Any = None, return_state: bool = False
) -> tuple[Tensor, list[Tensor] | None]:
    """A state of two parts, which begins elsewhere than at zero."""
    out = torch.zeros_like(x)
    total, most = state or (torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]) - 1e38)
    for t in range(x.shape[1]):
        now = torch.maximum(most, x[:, t])
        total, most = total * (most - now).exp() + (x[:, t] - now).exp(), now
        out[:, t] = (x[:, t] - most).exp() / total
    return out, [total, most] if return_state or state is not None else None


def begun_anew(x: Tensor, starts: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """``starts [1, T, 1]``: of documents."""
    now, rows = torch.zeros_like(x[:, 0]) if states is None else states, []
    for t in range(x.shape[1]):
        now = torch.where(starts[:, t], 0.0, now) / 2 + x[:, t]
        rows.append(now)
    return torch.stack(rows, 1), now


def forgetful(x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Takes a state and does nothing with it."""
    rows, now = [], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        now = now / 2 + x[:, t]
        rows.append(now)
    return torch.stack(rows, 1), now


def across(x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sequences see each other."""
    rows, now = [], torch.zeros_like(x[:, 0]) if state is None else state
    for t in range(x.shape[1]):
        now = now.mean(0) / 2 + x[:, t]
        rows.append(now)
    return torch.stack(rows, 1), now


class Back(nn.Module):
    """No tensors of its own; ``scale`` tells two of them apart."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        x: Tensor,
        keep: Tensor,
        c_initial: Tensor | None = None,
        return_last_states: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        state = torch.zeros_like(x[:, 0]) if c_initial is None else c_initial
        rows = []
        for t in range(x.shape[1]):
            state = keep * state + self.scale * x[:, t]
            rows.append(state)
        return torch.stack(rows, 1), state


class Layer(nn.Module):
    def __init__(self, kind: str, number: int) -> None:
        super().__init__()
        self.kind, self.inner = kind, Back(1.0 + number % 2)
        self.up, self.keep = nn.Linear(D, D), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x))
        if self.kind == "method":
            return x + self.inner(y, self.keep)[0]
        if self.kind == "starts":
            starts = torch.arange(x.shape[1])[None, :, None] % 5 == 0
            return x + begun_anew(y, starts, None)[0]
        if self.kind == "function":
            return x + decay(y, self.keep)[0]
        return (
            x + {"parts": softmax_so_far, "forgetful": forgetful, "across": across}[self.kind](y)[0]
        )


class Model(nn.Module):
    def __init__(self, kind: str, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.layers = nn.ModuleList(Layer(kind, i) for i in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def step(net: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
    net.zero_grad()
    loss = net(ids)
    loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def check(kind: str, chunk: int, shapes: list[tuple[int, int]], layers: int = 2) -> fxmem.Report:
    torch.compiler.reset()
    plain = Model(kind, layers).double()
    net = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=chunk, loss_chunk=chunk)))
    for shape in shapes:
        error, name = largest_difference(step(net, *shape), step(plain, *shape))
        assert error < 1e-10, (name, kind, chunk, shape)
    return fxmem.explain(net)


@pytest.mark.parametrize("kind", ["function", "parts", "method", "starts"])
def test_the_state_goes_from_chunk_to_chunk(kind: str) -> None:
    report = check(kind, 4, [(2, 13), (3, 9), (2, 4)], layers=3)
    assert not report.pieces
    assert not report.barriers
    assert report.executed_bodies


@pytest.mark.parametrize("kind", ["forgetful", "across"])
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_what_no_state_hands_on_runs_whole(kind: str) -> None:
    assert check(kind, 4, [(2, 13), (2, 9)]).pieces


def test_a_module_whose_settings_change() -> None:
    torch.compiler.reset()
    plain = Model("method", 2).double()
    net = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=4, loss_chunk=4)))
    for scale in (1.0, 3.0):
        for one in (net, plain):
            one.layers[1].inner.scale = scale
        assert largest_difference(step(net, 2, 9), step(plain, 2, 9))[0] < 1e-10
    assert not fxmem.explain(net).pieces


@settings(max_examples=3, deadline=None)
@example("parts", 1, [(1, 9), (2, 5)])
@given(
    st.sampled_from(["function", "parts", "method", "starts"]), st.sampled_from([1, 3, 7, 20]),
    st.lists(st.tuples(st.integers(1, 3), st.integers(4, 14)), min_size=1, max_size=2),
)  # fmt: skip
def test_any_shape(kind: str, chunk: int, shapes: list[tuple[int, int]]) -> None:
    check(kind, chunk, shapes)
