"""Logits of some rows alone: ``model(ids, logits_to_keep=...)``, as every loop of GRPO asks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_losses import LOSSES, Loss
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

Twins = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    fxmem.caches.clear()
    with everything_in_double():
        plain = tiny.model().double()
        plan = Plan(stream=Stream(chunk=7, loss_chunk=5))
        yield plain, fxmem.transform(copy.deepcopy(plain), plan)


def step(net: nn.Module, loss: Loss, length: int, rows: int, how: str) -> dict[str, Tensor]:
    ids = tiny.batch(2, length)["input_ids"]
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    data["attention_mask"][0, :2] = 0
    if how == "number":
        z = net(**data, logits_to_keep=rows + 1, use_cache=False).logits[:, :-1]
    elif how == "index":
        z = net(**data, logits_to_keep=torch.arange(length - rows - 1, length - 1)).logits
    else:
        z = net(**data, use_cache=False).logits[:, -rows - 1 : -1]
    teacher = torch.randn(z.shape, generator=torch.Generator().manual_seed(rows), dtype=z.dtype)
    net.zero_grad()
    value = loss(z, ids[:, -rows:], teacher)
    value.backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return {**grads, "loss": value.detach()}


SIZES = st.integers(9, 40).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t - 1)))


@pytest.mark.parametrize("name", LOSSES)
@given(
    calls=st.lists(SIZES, min_size=1, max_size=3), how=st.sampled_from(["number", "index", "slice"])
)
@example(calls=[(17, 8), (24, 12), (24, 8)], how="number")  # as many rows as a chunk; both vary
@example(calls=[(17, 2), (17, 1)], how="number")
@settings(max_examples=2, deadline=None)
def test_gradients(name: str, twins: Twins, calls: list[tuple[int, int]], how: str) -> None:
    plain, streamed = twins
    for length, rows in calls:
        want, got = (step(net, LOSSES[name], length, rows, how) for net in twins)
        assert set(got) == set(want)
        assert largest_difference(got, want)[0] <= 1e-10


def test_the_row_of_the_next_token_is_plain(twins: Twins) -> None:
    """Generation asks for it at every step; that it is one alone is nothing to warn of."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", fxmem.FxmemWarning)
        ids = tiny.batch(2, 20)["input_ids"]
        found = twins[1](input_ids=ids, logits_to_keep=1, use_cache=False).logits
    assert type(found) is Tensor
