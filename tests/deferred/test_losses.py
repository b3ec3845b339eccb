"""Losses computed outside the model from its logits: exact, streamed, one program per loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from double import everything_in_double, largest_difference
from outside_losses import LOSSES, Loss, batch
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

Twins = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    fxmem.caches.clear()  # shared code brings the guards of the capture that it was made in
    with everything_in_double():
        plain = tiny.model().double()
        plan = Plan(stream=Stream(chunk=7, loss_chunk=5))
        yield plain, fxmem.transform(copy.deepcopy(plain), plan)


def step(net: nn.Module, loss: Loss, data: dict[str, Tensor]) -> dict[str, Tensor]:
    net.zero_grad()
    value = loss(net(input_ids=data["ids"], use_cache=False).logits, data)
    value.backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return {**grads, "loss": value.detach()}


def recorder(net: nn.Module) -> Any:
    return fxmem.api._TRANSFORMED[net].recorder


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str, twins: Twins) -> None:
    plain, streamed = twins
    before = len(recorder(streamed).programs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxmem.FxmemWarning)
        for length in (23, 31):
            data = batch(length)
            want, got = (step(net, LOSSES[name], data) for net in (plain, streamed))
            assert set(got) == set(want)
            assert largest_difference(got, want)[0] <= 1e-10
    assert len(recorder(streamed).programs) == before + 1
    program = list(recorder(streamed).programs.values())[-1]
    (graph,) = program.backend.graphs
    assert not any(call.code.barriers for call in graph.calls)
