"""The names of TRL that fxmem takes over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from fxmem._compat.trl import Head, known, plain_head


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
