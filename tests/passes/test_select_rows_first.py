"""Picks of rows move to the hidden states, and only where every row is made of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from double import everything_in_double
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.frontend.capture import value_of
from fxmem.frontend.functional_writes import picked_rows
from fxmem.passes.select_rows_first import SelectRowsFirst
from fxmem.rewriting.pipeline import run_passes

B, T, D, V = 2, 11, 4, 20
Step = Callable[[Tensor], Tensor]
STEPS: dict[str, Step] = {
    "tempered": lambda x: x / 0.7,
    "capped": lambda x: 30 * torch.tanh(x / 30),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "normed": lambda x: x - torch.logsumexp(x, -1, keepdim=True),
    "mixed": lambda x: torch.logsumexp(torch.stack([x, 2 * x]), dim=0),
    "clamped": lambda x: x.clamp(-0.3, 0.4),
    "biased": lambda x: x + torch.linspace(0, 1, V, dtype=x.dtype),
    "by_token": lambda x: x * torch.linspace(0, 1, B * T, dtype=x.dtype).view(B, T, 1),
    "divergence": lambda x: F.kl_div(x, x.detach(), reduction="none", log_target=True),
}
PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flatten": lambda x, rows: x.flatten(0, 1)[rows],
    "reshape": lambda x, rows: x.reshape(-1, V).index_select(0, rows),
    "torch": lambda x, rows: torch.index_select(x.view(B * T, V), 0, rows),
    "from the end": lambda x, rows: x.flatten(0, 1)[rows - B * T],
}


class Net(nn.Module):
    def __init__(self, steps: list[Step], pick: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.steps, self.pick = steps, pick

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        x = self.head(self.embed(ids))
        for step in self.steps:
            x = step(x)
        return (self.pick(x, rows) ** 2).sum()


def inputs(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(V, (B, T), generator=generator)
    return ids, torch.randperm(B * T, generator=generator)[:count]


def rewritten(net: nn.Module) -> fx.GraphModule:
    found: list[fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(net, backend=lambda gm, _: found.append(gm) or gm, dynamic=True)(*inputs())
    return run_passes((SelectRowsFirst(),), found[0])


def whole(gm: fx.GraphModule) -> list[str]:
    """Values of all tokens, a vocabulary wide."""
    values = ((n.name, value_of(n)) for n in gm.graph.nodes)
    return [name for name, v in values if isinstance(v, Tensor) and v.numel() == B * T * V]


@pytest.mark.parametrize("step", STEPS)
def test_no_row_is_made_for_nothing(step: str) -> None:
    gm = rewritten(Net([STEPS[step]], PICKS["flatten"]))
    assert any(n.target is picked_rows for n in gm.graph.nodes)
    assert not whole(gm)


OTHERS: dict[str, Step] = {
    "along tokens": lambda x: x.softmax(1),
    "summed over the batch": lambda x: x - x.sum(0, keepdim=True),
    "shifted": lambda x: x.roll(1, 1),
    "of a row of another's": lambda x: x * x[:, :1],
    "random": lambda x: F.dropout(x, 0.5),
}


@pytest.mark.parametrize("step", OTHERS)
def test_rows_that_need_others_stay(step: str) -> None:
    gm = rewritten(Net([OTHERS[step]], PICKS["flatten"]))
    assert not any(n.target is picked_rows for n in gm.graph.nodes)


def test_what_others_read_is_made_once() -> None:
    def both(x: Tensor, rows: Tensor) -> Tensor:
        return x.flatten(0, 1)[rows] * x.mean()

    gm = rewritten(Net([], both))
    assert [n.target for n in gm.graph.nodes].count(F.linear) == 1
    assert not any(n.target is picked_rows for n in gm.graph.nodes)


def test_rows_that_others_read_too_stay() -> None:
    def both(x: Tensor, rows: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return flat[rows] * flat.mean()

    assert not any(n.target is picked_rows for n in rewritten(Net([], both)).graph.nodes)


class Twice(Net):
    """The head runs without gradients first, of the same states."""

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        h = self.embed(ids)
        with torch.no_grad():
            teacher = self.head(h).softmax(-1)
        masked = torch.where((ids > 3).unsqueeze(-1), self.head(h).log_softmax(-1), teacher)
        return (masked * teacher).flatten(0, 1)[rows].sum()


def test_rows_are_picked_with_and_without_gradients() -> None:
    assert any(n.target is picked_rows for n in rewritten(Twice([], None)).graph.nodes)
    assert_exact(Twice([], None), 7)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(STEPS | OTHERS)), max_size=3), st.sampled_from(sorted(PICKS)),
    st.integers(2, B * T),
)  # fmt: skip
def test_exact(steps: list[str], pick: str, count: int) -> None:
    steps = [s for s in steps if s != "random"]
    assert_exact(Net([(STEPS | OTHERS)[s] for s in steps], PICKS[pick]), count)


def assert_exact(net: Net, count: int) -> None:
    with everything_in_double():
        net, found = net.double(), []
        torch._dynamo.reset()
        plan = Plan(stream=Stream(chunk=3, loss_chunk=3))
        streamed = torch.compile(net, backend=fxmem.backend(plan), dynamic=True)
        for call in (net, streamed):
            net.zero_grad()
            loss = call(*inputs(count))
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
