"""Lower precision: bf16 gradients against float64, and mixture-of-experts models as configured."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from torch import Tensor

import fxmem
from fxmem import Plan, Stream


def streamed(
    net: torch.nn.Module, inputs: dict[str, Tensor], chunk: int
) -> tuple[float, dict[str, Tensor]]:
    fxmem.transform(net, Plan(stream=Stream(chunk=chunk, loss_chunk=chunk)))
    result = tiny.step(net, inputs)
    fxmem.restore(net)
    return result


def norm_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    total = sum(float((got[n].double() - w).square().sum()) for n, w in want.items())
    return float(total**0.5)


@pytest.mark.parametrize("chunk", [2, 64])
def test_bf16_error_is_that_of_plain_bf16(chunk: int) -> None:
    net = tiny.model(max_position_embeddings=512).bfloat16()
    inputs = tiny.batch(1, 400)
    with everything_in_double():
        _, exact = tiny.step(copy.deepcopy(net).double(), inputs)
    _, plain = tiny.step(net, inputs)
    _, got = streamed(net, inputs, chunk)
    assert norm_error(got, exact) <= 1.1 * norm_error(plain, exact)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_default_experts_in_float32(name: str) -> None:
    net = tiny.model(name, default_experts=True)
    assert net.config._experts_implementation != "eager"
    inputs = tiny.batch(3, 23, "mixed")
    loss, want = tiny.step(net, inputs)
    got_loss, got = streamed(net, inputs, 7)
    difference, where = largest_difference(got, want)
    assert difference <= 1e-5, where
    assert abs(got_loss - loss) <= 1e-6 * abs(loss)
