"""Memory of steps with roles: what is alive, and what `explain` predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD, Stream
from fxmem.blocks.attach import state_of
from fxmem.measure import live as measure


def build(
    stream: Stream | None, *, hidden: int = 64, vocab: int = 2048, layers: int = 3,
    dtype: torch.dtype = torch.float32, tied: bool = False, **options: Any,
) -> Any:  # fmt: skip
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=vocab, use_cache=False,
        max_position_embeddings=4096, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    net = LlamaForCausalLM(config).to(dtype).train()
    fxmem.transform(net, Plan(stream=stream, blocks=Blocks(order="fixed", **options)))
    return net, BlockAdamW(net)


def peak(net: Any, opt: BlockAdamW, length: int) -> int:
    """Of the second step's forward and backward, above weights, optimizer state and inputs."""
    ids = torch.randint(net.config.vocab_size, (1, length))
    net(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    net.zero_grad()
    return measure.track(lambda: net(input_ids=ids, labels=ids).loss.backward()).peak


CASES: dict[str, dict[str, Any]] = {
    "badam": {"inactive": None, "start": 1},
    "sgd": {"inactive": SGD(1e-4), "start": 1},
    "sgd all": {"inactive": SGD(1e-4), "reach": "all", "start": 1},
    "sign": {"inactive": SignSGD(1e-4), "start": 0},
    "accumulate": {"inactive": SGD(1e-4), "accumulation": "accumulate", "reach": "all"},
    "low rank": {"inactive": LowRank(rank=4), "reach": "all", "start": 1},
    "bfloat16": {"inactive": SGD(1e-4), "reach": "all", "dtype": torch.bfloat16},
    "tied": {"inactive": SGD(1e-4), "reach": "all", "tied": True, "start": 1},
}  # fmt: skip
QUICK = {("sgd all", "whole"), ("sgd", "streamed"), ("low rank", "streamed")}


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(c, w, marks=() if (c, w) in QUICK else pytest.mark.slow)
        for c in CASES
        for w in ("streamed", "whole")
    ],
)
def test_explain_predicts_the_peak(case: str, way: str) -> None:
    stream = Stream(chunk=128, loss_chunk=128) if way == "streamed" else None
    net, opt = build(stream, **CASES[case])
    measured = peak(net, opt, 640)
    report = fxmem.explain(net)
    assert report.predicted_peak_bytes == pytest.approx(measured, rel=0.1)
    assert report.predicted is not None
    held = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
    terms = [t.grad.nbytes for a in state_of(net).adapters.values() for t in (a.up, a.down)
             if t.grad is not None]  # fmt: skip
    assert report.predicted.parameter_gradient_bytes == held + sum(terms)


@pytest.mark.parametrize(
    ("kind", "alive"), [(SGD(1e-4), 0), (SignSGD(1e-4), 1)], ids=["sgd", "sign"]
)
def test_one_inactive_gradient_is_alive_in_one_chunk(kind: Any, alive: int) -> None:
    """Weights dwarf activations here. Over BAdam a step with updates needs one gradient, or none
    where products go straight into the weights; in several chunks those of one layer.
    """
    shape: dict[str, Any] = {"hidden": 192, "vocab": 16, "layers": 3, "reach": "all"}
    badam = peak(*build(None, **shape, inactive=None), 8)
    net, opt = build(None, **shape, inactive=kind)
    largest = max(p.nbytes for p in net.parameters())
    layer = sum(p.nbytes for p in net.model.layers[0].parameters())
    assert peak(net, opt, 8) - badam < (alive + 0.4) * largest
    streamed = peak(*build(Stream(chunk=4, loss_chunk=4), **shape, inactive=kind), 8)
    assert streamed - badam < 1.1 * layer
    assert largest < layer / 3
