"""The estimate against published table values (BAdam, BREAD) on models without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import fxmem
from fxmem import SGD, Blocks, LowRank, Plan, Stream
from fxmem.errors import PlanError
from fxmem.memory.block_formula import estimate

SIZES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
}  # fmt: skip


def llama(size: str) -> nn.Module:
    config = tf.LlamaConfig(**SIZES[size], vocab_size=128256, num_key_value_heads=8)
    with torch.device("meta"):
        return tf.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("size", "layer", "adapters", "dense", "head", "limit"),
    [("8B", 19.55, 0.34, 0.117, 24.47, 24), ("70B", 154.80, 1.66, 0.470, 157.92, 300)],
)
def test_table_of_bytes(
    size: str, layer: float, adapters: float, dense: float, head: float, limit: float
) -> None:
    net = llama(size)
    plain = estimate(net, Blocks())
    assert (plain.weights + plain.block) / 1e9 == pytest.approx(layer, abs=0.01)
    whole = estimate(net, Blocks(outer="blocks"))
    assert (whole.weights + whole.block) / 1e9 == pytest.approx(head, abs=0.01)
    low = estimate(net, Blocks(inactive=LowRank(rank=8), update_head=False))
    assert low.adapters / 1e9 == pytest.approx(adapters, abs=0.01)
    # with few logits at a time the largest moment is inside a layer
    frozen_head = estimate(net, Blocks(inactive=SGD(1e-5), outer="frozen"), chunk=64)
    assert frozen_head.gradient / 1e9 == pytest.approx(dense, abs=0.001)
    trained_head = estimate(net, Blocks(inactive=SGD(1e-5)))
    for found in (plain, low, frozen_head, trained_head):
        assert found.total / 1e9 < limit
    assert "GB" in str(plain)


def test_explain_shows_bytes_and_the_epoch_of_a_model_without_weights() -> None:
    net = llama("8B").to(torch.bfloat16).train()
    fxmem.transform(net, Plan(stream=Stream(), blocks=Blocks(inactive=SGD(1e-5))))
    report = fxmem.explain(net)
    assert report.block_bytes is not None
    assert report.block_bytes.total / 1e9 < 24
    assert report.blocks is not None
    assert len(report.blocks.visits) == 32
    assert {v.state_bytes for v in report.blocks.visits} == {12 * 218_112_000}
    text = str(report)
    assert "not run yet" in text
    assert "total" in text
    assert "block-epoch 0" in text


def test_the_sum_over_chunks_of_a_trained_head_is_in_float32() -> None:
    net = llama("8B")
    frozen = estimate(net, Blocks(inactive=SGD(1e-5), update_head=False))
    trained = estimate(net, Blocks(inactive=SGD(1e-5)))
    assert trained.gradient >= 6 * 128256 * 4096
    assert trained.total > frozen.total


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(PlanError, match="tokens"):
        estimate(llama("8B"), Blocks(), tokens=0)
