"""Streamed gradients equal plain autograd's in float64 at 1e-10, on many architectures."""

from __future__ import annotations

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from torch import Tensor

import fxmem
from fxmem import Plan, Stream

TOLERANCE = 1e-10


def compare(net: torch.nn.Module, inputs: dict[str, Tensor], chunk: int, loss_chunk: int) -> None:
    loss, want = tiny.step(net, inputs)
    fxmem.transform(net, Plan(stream=Stream(chunk=chunk, loss_chunk=loss_chunk)))
    got_loss, got = tiny.step(net, inputs)
    fxmem.restore(net)
    difference, name = largest_difference(got, want)
    assert difference <= TOLERANCE, name
    assert abs(got_loss - loss) <= TOLERANCE * abs(loss)


FEW = ("llama", "gpt2", "gemma2", "mixtral", "mistral-5", "mistral-12")
"""One of each kind: rotary and learned positions, softcaps, experts, windows."""


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in tiny.CONFIGS]
)
def test_ragged_chunks_with_padding(name: str) -> None:
    with everything_in_double():
        net = tiny.model(name).double()
        compare(net, tiny.batch(3, 23, "mixed"), chunk=7, loss_chunk=5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_batch_of_one(name: str) -> None:
    with everything_in_double():
        compare(tiny.model(name).double(), tiny.batch(1), chunk=12, loss_chunk=7)


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 40])
def test_chunk_sizes(chunk: int) -> None:
    with everything_in_double():
        compare(tiny.model("qwen3").double(), tiny.batch(2), chunk=chunk, loss_chunk=chunk)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(padding: str) -> None:
    with everything_in_double():
        compare(tiny.model("mistral-5").double(), tiny.batch(2, 23, padding), 7, 7)


@pytest.mark.parametrize("first", [7, 9])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_documents(name: str, first: int) -> None:
    with everything_in_double():
        compare(tiny.model(name).double(), tiny.packed(first=first), chunk=7, loss_chunk=7)


def test_eager_attention_streams_by_its_own_labels() -> None:
    with everything_in_double():
        net = tiny.model("llama", _attn_implementation="eager").double()
        compare(net, tiny.batch(2, 23, "left"), chunk=7, loss_chunk=5)


@pytest.mark.parametrize("count", [17, torch.tensor(17)])
def test_num_items_in_batch(count: int | Tensor) -> None:
    with everything_in_double():
        compare(tiny.model().double(), {**tiny.batch(), "num_items_in_batch": count}, 7, 5)


def test_all_labels_ignored_gives_zero_gradients() -> None:
    inputs = tiny.batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    net = fxmem.transform(tiny.model(), Plan(stream=Stream(chunk=7, loss_chunk=5)))
    loss, grads = tiny.step(net, inputs)
    assert loss != loss
    assert all(not g.any() for g in grads.values())


@pytest.mark.slow
@pytest.mark.parametrize("padding", [None, "left", "right", "mixed"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 22, 23, 31])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_everything(name: str, chunk: int, size: int, padding: str | None) -> None:
    with everything_in_double():
        net = tiny.model(name).double()
        compare(net, tiny.batch(size, 23, padding), chunk=chunk, loss_chunk=chunk)
