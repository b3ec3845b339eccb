"""What holds most of a model is captured in parts where it cannot be captured as one graph; where
that fails too, it runs as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

import fxmem
from fxmem import CaptureError, Plan, Stream
from fxmem.frontend.in_parts import InParts

D, VOCAB = 8, 11
PLAN = Plan(stream=Stream(chunk=5, loss_chunk=4))
pytestmark = pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")


class Backbone(nn.Module):
    """Its forward has a branch on values, behind which the length is a number at first, before
    layers that get a mask from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, D), nn.Embedding(32, D)
        self.register_buffer("places_of", torch.arange(32)[None])
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        at = torch.arange(length)
        mask = at[:, None] >= at
        assert ids.max().item() < VOCAB
        x = self.embed(ids) + self.places(self.places_of[:, :length])
        for layer in self.layers:
            h = layer(x)[:, None]
            x = x + fn.scaled_dot_product_attention(h, h, h, attn_mask=mask)[:, 0]
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.backbone(ids))
        return fn.cross_entropy(logits.flatten(0, 1), ids.flatten())


def compare(net: nn.Module) -> fxmem.Report:
    plain = copy.deepcopy(net)
    fxmem.transform(net, PLAN)
    for length in (13, 17):
        ids = torch.randint(VOCAB, (2, length))
        for model in (net, plain):
            model.zero_grad()
            model(ids).backward()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    return fxmem.explain(net)


def test_most_of_a_model_is_captured_in_parts() -> None:
    report = compare(Model().double())
    assert "ids.max().item()" in report.in_parts
    assert not report.pieces and report.executed_bodies


def test_it_runs_as_it_is_where_parts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = InParts.begin

    def fails(self: InParts, model: nn.Module, given: Iterable[Tensor]) -> None:
        begin(self, model, given)
        if self.now:
            raise CaptureError("no part of it can be captured")

    monkeypatch.setattr(InParts, "begin", fails)
    report = compare(Model().double())
    assert not report.in_parts
    assert [p.name for p in report.pieces] == ["backbone"]


def test_a_mask_may_leave_the_call() -> None:
    class Tells(Model):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            at = torch.arange(ids.shape[1])
            mask = at[:, None] - at < 4
            h = self.head(self.backbone.embed(ids))[:, None]
            x = fn.scaled_dot_product_attention(h, h, h, attn_mask=mask)
            return fn.cross_entropy(x.flatten(0, 2), ids.flatten()), mask

    net = Tells().double()
    plain = copy.deepcopy(net)
    fxmem.transform(net, PLAN)
    ids = torch.randint(VOCAB, (2, 13))
    (got, seen), (want, mask) = net(ids), plain(ids)
    assert torch.equal(seen, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
