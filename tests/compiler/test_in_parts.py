"""A line in the outermost forward that no capture takes: what is before and behind it streams."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attending import Layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import FxmemWarning, Plan, Stream

D, WORDS = 8, 11
PLAN = Plan(stream=Stream(chunk=5, loss_chunk=4))


class Piece(nn.Module):
    """Runs as it is, in a model that is captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(D, D)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.w(x) if x.sum() > -1e6 else x


def branches(net: Any, x: Tensor, ids: Tensor) -> Any:
    if x.mean() > 0.01:
        x = x * 2
    return x, ids


def asks_a_mask(net: Any, x: Tensor, ids: Tensor) -> Any:
    mask = ids > 0
    if not mask.all():
        x = x * mask.unsqueeze(-1)
    return x, ids


def cuts(net: Any, x: Tensor, ids: Tensor) -> Any:
    many = int((ids > 1).sum(1).max())
    return x[:, :many], ids[:, :many]


def loops(net: Any, x: Tensor, ids: Tensor) -> Any:
    for _ in range(int(ids.max()) % 3 + 1):
        x = net.again(x)
    return x, ids


def notes(net: Any, x: Tensor, ids: Tensor) -> Any:
    net.seen.append(float(x.detach().mean()))
    return x / x.detach().abs().max().item(), ids


@torch.compiler.disable
def of_a_library(x: Tensor) -> Tensor:
    return torch.from_numpy(np.cbrt(x.detach().numpy()))


def calls_a_library(net: Any, x: Tensor, ids: Tensor) -> Any:
    return x + of_a_library(x), ids


def has_a_piece(net: Any, x: Tensor, ids: Tensor) -> Any:
    return net.piece(x), ids


def writes(net: Any, x: Tensor, ids: Tensor) -> Any:
    net.mean.mul_(0.5).add_(x.detach().mean((0, 1)))
    return x * (1 + net.mean.clone()), ids


LINES = (branches, asks_a_mask, cuts, loops, notes, calls_a_library)
KINDS = (*LINES, has_a_piece, writes)


class Net(nn.Module):
    def __init__(self, lines: list[Any], loss: bool) -> None:
        super().__init__()
        self.embed, self.head, self.again = nn.Embedding(WORDS, D), nn.Linear(D, WORDS), Layer(D)
        self.first = nn.ModuleList(Layer(D) for _ in range(2))
        self.layers, self.piece = nn.ModuleList(Layer(D) for _ in lines), Piece()
        self.register_buffer("mean", torch.zeros(D))
        self.lines, self.loss = lines, loss
        self.seen: list[float] = []

    def forward(self, ids: Tensor) -> Any:
        x = self.first[1](self.first[0](self.embed(ids)))
        x, ids = self.lines[0](self, x, ids)
        x = self.layers[0](x)
        for i in range(1, len(self.lines)):
            x, ids = self.lines[i](self, x, ids)
            x = self.layers[i](x)
        logits = self.head(x)
        return loss_of(logits, ids) if self.loss else logits


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    ids = ids[:, : logits.shape[1]]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ids_of(length: int) -> Tensor:
    return torch.randint(WORDS, (2, length), generator=torch.Generator().manual_seed(length))


def near(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def agree(lines: list[Any], loss: bool, lengths: list[int]) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Net(lines, loss).double()
    streamed = fxmem.transform(copy.deepcopy(plain), PLAN)
    for length in lengths:
        ids = ids_of(length)
        losses = []
        for net in (streamed, plain):
            net.zero_grad()
            torch.manual_seed(length)
            out = net(ids)
            value = out if loss else loss_of(out, ids)
            value.backward()
            losses.append(value.detach())
        near(*losses)
        for (name, p), q in zip(streamed.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                near(p.grad, q.grad)
        for p, q in zip(streamed.buffers(), plain.buffers(), strict=True):
            near(p, q)
        near(streamed.seen, plain.seen)
    return streamed


def test_a_branch_and_a_piece_in_one_model() -> None:
    with pytest.warns(FxmemWarning) as caught:
        net = agree([has_a_piece, branches, writes], True, [13, 9])
    (told,) = [str(w.message) for w in caught if "in parts" in str(w.message)]
    assert "if x.mean() > 0.01" in told and "test_in_parts.py" in told
    report = fxmem.explain(net)
    assert "if x.mean() > 0.01" in report.in_parts and report.in_parts in str(report)
    assert [p.name for p in report.pieces] == ["piece"]
    assert report.loops and report.predicted is None


@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_logits_of_the_last_part_are_deferred() -> None:
    net = agree([cuts, writes, writes], False, [13, 9])
    assert fxmem.explain(net).deferred


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("line", LINES)
def test_a_line_that_cannot_be_captured(line: Any, loss: bool) -> None:
    report = fxmem.explain(agree([line], loss, [13, 13, 9]))
    assert report.in_parts and report.loops


@pytest.mark.slow
def test_any_lines_in_any_order() -> None:
    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.booleans())
    def check(lines: list[Any], loss: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxmemWarning)
            agree(lines, loss, [13, 9])

    check()


class Between(nn.Module):
    """The number leaves a part beside the states, which are no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(WORDS, D), Layer(D), nn.Linear(D, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.embed(ids))
        size = x.square().mean()
        if size > 1e6:
            x = x / 2
        return loss_of(self.head(self.layer(x)), ids) + 0.01 * size


def test_nothing_is_dropped_before_the_last_part() -> None:
    torch._dynamo.reset()
    plain = Between().double()
    compiled, ids = torch.compile(copy.deepcopy(plain), backend="fxmem"), ids_of(9)
    got, want = (torch.autograd.grad(m(ids), list(m.parameters())) for m in (compiled, plain))
    near(list(got), list(want))


class Fails(Net):
    """Cannot be captured in parts either: a later one would make a buffer part of a graph."""

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        if x.mean() > 1e6:
            x = x / 2
        self.mean.add_(x.mean((0, 1)))
        return loss_of(self.head(x), ids)


def test_what_fails_in_parts_too_is_the_error_of_one_graph() -> None:
    net = fxmem.transform(Fails([writes], True), PLAN)
    for _ in range(2):
        with pytest.raises(fxmem.CaptureError, match="if x.mean\\(\\) > 1e6"):
            net(ids_of(9))
    assert not net.mean.any() and not net.mean.requires_grad  # type: ignore[operator,union-attr]
    assert not fxmem.explain(net).in_parts
