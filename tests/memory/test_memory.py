"""The predicted peak against the measured one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import fxmem
from fxmem import api
from fxmem.compiler.step import CompiledGraph
from fxmem.measure import live as measure
from fxmem.memory.predict import body_bytes, predict
from fxmem.runtime.profile import profile

VOCAB = 4096


def build(*, tied: bool = False, chunk: int | None = 128) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    stream = fxmem.Stream() if chunk is None else fxmem.Stream(chunk=chunk, loss_chunk=chunk)
    fxmem.transform(model, fxmem.Plan(stream=stream))
    return model


def step(model: LlamaForCausalLM, length: int, batch: int = 1) -> Callable[[], None]:
    ids = torch.randint(VOCAB, (batch, length))

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return run


def graph_of(model: LlamaForCausalLM) -> CompiledGraph:
    return api._TRANSFORMED[model].graphs[-1]


def compare(model: LlamaForCausalLM, length: int, batch: int = 1) -> None:
    step(model, 64, batch)()
    model.zero_grad(set_to_none=True)
    curve = measure.track(step(model, length, batch))
    graph = graph_of(model)
    predicted = predict(graph, graph.sizes)
    assert predicted.peak_bytes == pytest.approx(curve.peak, rel=0.1)
    # what stays: the gradients, each once
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert predicted.parameter_gradient_bytes == held
    assert predicted.saved_bytes <= predicted.peak_bytes
    assert max(size for _, size in predicted.timeline) == predicted.peak_bytes


@pytest.mark.parametrize("chunk", [128, 512])
@pytest.mark.parametrize("tied", [False, True], ids=["separate", "tied"])
def test_predicted_peak_is_the_measured_one(tied: bool, chunk: int) -> None:
    model = build(tied=tied, chunk=chunk)
    for length in (1024, 2048):
        compare(model, length)


def test_a_ragged_tail_and_a_batch() -> None:
    compare(build(), 1100, batch=2)


def test_a_mixture_of_experts() -> None:
    config = MixtralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=8192,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=128, loss_chunk=128)))
    compare(model, 2048)


def test_a_call_that_is_too_small_to_stream() -> None:
    model = build(chunk=None)
    compare(model, 32)
    assert graph_of(model).whole_calls


def test_bodies_grow_with_the_chunk_and_are_interpolated_well() -> None:
    model = build()
    step(model, 256)()
    for call in graph_of(model).calls:
        kind = "loss" if call.code.is_loss else "forward"
        last = 0
        for chunk in (64, 300, 1024):
            exact = max(profile(call.code, kind, {"T": 3072}, chunk).bodies)
            guess = body_bytes(call.code, kind, {"T": 3072}, chunk)
            assert guess == pytest.approx(exact, rel=0.15)
            assert guess > last
            last = guess


def test_prediction_runs_nothing() -> None:
    model = build()
    step(model, 256)()
    graph = graph_of(model)
    # half a million tokens: allocating any of it would show
    assert measure.track(lambda: predict(graph, {"T": 1 << 19})).peak < 1 << 20
