"""What a forecast is made of: empty models, replays, curves, searches, optimizers, devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxmem.demo.models import enable_checkpointing
from fxmem.measure import peak_bytes
from fxmem.planning import devices
from fxmem.planning.curve import CLOSE, SAMPLES, Curve, longest
from fxmem.planning.modes import mode_of
from fxmem.planning.moments import Steps
from fxmem.planning.replay import plain_step
from fxmem.planning.weightless import without_weights


class Output:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.softmax(x @ x.mT, -1) @ self.linear(x)


class Square(nn.Module):
    """Every layer makes a table of length x length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        loss = nn.functional.cross_entropy(x[0] @ self.embed.weight.T, labels[0])
        return Output(loss)


def test_an_empty_copy_has_shapes_and_no_memory() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    before = {n: p.clone() for n, p in model.named_parameters()}
    empty = without_weights(model)
    assert [(n, p.shape) for n, p in empty.named_parameters()] == [
        (n, p.shape) for n, p in before.items()
    ]
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert all(p.untyped_storage().nbytes() == 0 for p in empty.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_curve_is_the_replay_at_any_length(checkpoints: bool) -> None:
    model = Square()

    def replay(length: int) -> Steps:
        return plain_step(model, length, 1, checkpoints=checkpoints, workspaces=False)

    curve = Curve(replay)
    for length in (777, SAMPLES[1], 3 * SAMPLES[2]):
        assert np.array_equal(curve.at(length).bytes, replay(length).bytes)


def test_checkpoints_save_less_and_blocks_save_less() -> None:
    model = Square()
    plain = plain_step(model, 512, 1).peak
    assert plain_step(model, 512, 1, checkpoints=True).peak < 0.7 * plain
    last = {"layers.2.linear.weight", "layers.2.linear.bias"}
    frozen = plain_step(model, 512, 1, learning=last)
    assert frozen.peak < plain
    assert frozen.bytes[-1, 0] == 4 * (16 * 16 + 16)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_replayed_peak_is_the_measured_one(checkpoints: bool) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    predicted = plain_step(model, 1024, 1, checkpoints=checkpoints).peak
    if checkpoints:
        enable_checkpointing(model)
    ids = torch.randint(1024, (1, 1024))
    found = peak_bytes(lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert predicted == pytest.approx(found, rel=0.01)


@given(
    fixed=st.integers(0, 10**6), line=st.integers(1, 10**5), square=st.integers(0, 20),
    limit=st.integers(1, 10**11),
)  # fmt: skip
def test_the_longest_fits_and_a_longer_one_does_not(
    fixed: int, line: int, square: int, limit: int
) -> None:
    asked: list[int] = []

    def bytes_at(length: int) -> int:
        asked.append(length)
        return fixed + line * length + square * length**2

    found = longest(bytes_at, limit)
    if found:
        assert bytes_at(found) <= limit
    assert bytes_at(int(found * (1 + CLOSE)) + 2) > limit or found > 1 << 23
    assert len(asked) < 50


def test_state_is_what_the_optimizer_makes() -> None:
    model = Square()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    made = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert mode_of("adamw", model, 0).state == made
    assert mode_of("sgd", model, 0).state == 0
    assert 0 < mode_of("adamw8bit", model, 0).state <= made


def test_blocks_train_one_layer_and_lora_its_adapters() -> None:
    model = Square()
    blocks = mode_of("blocks", model, 0)
    assert {n for n, p in blocks.model.named_parameters() if p.requires_grad} == {
        "layers.0.linear.weight", "layers.0.linear.bias"
    }  # fmt: skip
    assert blocks.state == 2 * 4 * (16 * 16 + 16)
    assert all(p.requires_grad for p in model.parameters())


def test_a_gpu_is_in_the_table() -> None:
    gpu = devices.device_of("H100", torch.bfloat16)
    assert gpu.kind == "cuda"
    assert 75e9 < gpu.memory < 80e9
    assert gpu.rates.flops > devices.device_of("h100", torch.float32).rates.flops
