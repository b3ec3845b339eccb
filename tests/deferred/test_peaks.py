"""Losses outside the model take about as much memory as labels that the model is given."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import row_losses
import tiny
import torch
from outside_losses import LOSSES, batch
from torch import Tensor, nn

import fxmem

VOCAB, TOKENS = 8192, 1024
PAIRS = ("dpo", "halves_of_logits", "orpo")
FEW = ("cross_entropy", "dpo", "grpo", "distillation")
"""One loop, two, logits written to in place, and an input as large as the logits."""
LIMITS = {"grpo": 1.35, "divergence_of_answers": 1.6, "entropy": 1.5}
"""Of the peak with labels; 1.3 for the others. GRPO and "entropy" take an entropy besides, and the
divergence makes a mixture of two distributions.
"""


def peak(net: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Of the second step, above what lives between steps."""
    loss().backward()
    net.zero_grad()
    return fxmem.measure.peak_bytes(lambda: loss().backward())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return fxmem.transform(tiny.model(num_hidden_layers=1, vocab_size=VOCAB, hidden_size=64))


@pytest.fixture(scope="module")
def given(net: nn.Module) -> Callable[[int], int]:
    """The peak with labels, by the number of sequences."""

    def measured(count: int) -> int:
        data = batch(TOKENS // count, VOCAB, torch.float32, count)
        return peak(net, lambda: net(input_ids=data["ids"], labels=data["labels"]).loss)

    return functools.cache(measured)


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES]
)
def test_peak(name: str, net: nn.Module, given: Callable[[int], int]) -> None:
    count = 2 if name in PAIRS else 1
    data = batch(TOKENS // count, VOCAB, torch.float32, count)
    taken = peak(net, lambda: LOSSES[name](net(input_ids=data["ids"]).logits, data))
    own = data["teacher"].nbytes if name == "divergence_of_answers" else 0  # the loss adds to it
    assert taken - own <= LIMITS.get(name, 1.3) * given(count)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cross_entropy", "dpo"])
def test_peak_without_gradients(name: str, net: nn.Module) -> None:
    count = 2 if name in PAIRS else 1
    data = batch(TOKENS // count, VOCAB, torch.float32, count)

    def least(call: Callable[[], Tensor]) -> int:
        call().item()
        return fxmem.measure.peak_bytes(lambda: call().item())

    given = least(lambda: net(input_ids=data["ids"], labels=data["labels"]).loss)
    taken = least(lambda: LOSSES[name](net(input_ids=data["ids"]).logits, data))
    chosen = least(lambda: net(input_ids=data["ids"]).logits.argmax(-1).sum())
    assert max(taken, chosen) <= 1.3 * given
    assert given <= TOKENS * VOCAB  # a quarter of the logits


@pytest.mark.parametrize("name", row_losses.LOSSES)
def test_peak_of_some_rows(name: str, net: nn.Module, given: Callable[[int], int]) -> None:
    """What the rows of labels take, and the teacher's."""
    length, rows = TOKENS // 2, TOKENS // 4
    ids = batch(length, VOCAB, torch.float32, 2)["ids"]
    teacher = torch.randn(2, rows, VOCAB)

    def asked() -> Tensor:
        z = net(input_ids=ids, logits_to_keep=rows + 1, use_cache=False).logits[:, :-1]
        return row_losses.LOSSES[name](z, ids[:, -rows:], teacher)

    with warnings.catch_warnings():
        warnings.simplefilter("error", fxmem.FxmemWarning)
        taken = peak(net, asked)
    own = 2 * teacher.nbytes if name == "best of teacher" else 0  # log_softmax, copied by topk
    assert taken - own <= LIMITS.get(name, 1.3) * given(2)
