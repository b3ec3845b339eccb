"""The names of TRL that fxmem takes over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from fxmem._compat.trl import Head, known, plain_head, spare_kernels


def test_the_names_are_there() -> None:
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction and known(ChunkedLogProbFunction)
    with plain_head():
        assert utils._ChunkedLogProbFunction is Head
        assert not utils._use_triton(torch.device("cuda"))
        with plain_head():  # a transformed model within another
            assert utils._ChunkedLogProbFunction is Head
        assert utils._ChunkedLogProbFunction is Head
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_it_computes_the_same(softcap: float | None) -> None:
    given = [torch.randn(11, 6), torch.randn(17, 6), torch.randn(17)]
    targets = torch.randint(17, (11,))

    def run(function: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        out = function.apply(*leaves, targets, 0.7, 5, softcap, 1.3)
        (out[0].square().sum() + out[1].sum()).backward()
        return [*out[:4], out[4].float(), *(x.grad for x in leaves)]

    for got, want in zip(run(Head), run(ChunkedLogProbFunction), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_kernels_are_not_given_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here by force."""

    class Recorded(Tensor):
        pass

    seen: list[type] = []

    def kernel(logits: Tensor, index: Tensor, **_: object) -> tuple[Tensor, None]:
        seen.append(type(logits))
        return logits.log_softmax(-1).gather(-1, index[..., None]).squeeze(-1), None

    monkeypatch.setattr(utils, "_supports_trl_loss_kernel", lambda *_: True)
    monkeypatch.setattr(utils, "is_triton_available", lambda: True)
    monkeypatch.setattr(utils, "_fused_logprob_entropy", kernel, raising=False)
    for _ in range(2):
        spare_kernels(Recorded)
    logits, index = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    given = (logits, logits.as_subclass(Recorded))
    plain, recorded = (utils.selective_log_softmax(x, index) for x in given)
    assert seen == [Tensor]
    assert (plain - recorded).abs().max() < 1e-6
