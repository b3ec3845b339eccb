"""Causal language models of transformers of every kind: exact, or an error that has a name."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from double import everything_in_double, largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

NAMED = ("gemma3n_text", "jetmoe")
"""May be refused: experts of a size that depends on the data, a weight that is clamped in place."""


def step(net: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor | None]]:
    net.zero_grad()
    loss = net(**inputs).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in net.named_parameters()}


def compare(name: str) -> fxmem.Report:
    """Two lengths, one of them padded on the left where the plain model can take that."""
    torch._dynamo.reset()
    with everything_in_double():
        net = zoo.model(name).train(name not in zoo.EVALUATED)
        given, want = [], []
        for inputs in (zoo.batch(23, padded=False), zoo.batch(37, padded=True)):
            found = step(net, inputs)
            if math.isnan(found[0]):
                inputs = {k: inputs["input_ids"] for k in ("input_ids", "labels")}
                found = step(net, inputs)
            given.append(inputs)
            want.append(found)
        fxmem.transform(net, Plan(stream=Stream(chunk=7, loss_chunk=5)))
        for inputs, (loss, grads) in zip(given, want, strict=True):
            got_loss, got = step(net, inputs)
            assert abs(got_loss - loss) <= 1e-10 * abs(loss)
            assert {n for n, g in got.items() if g is None} == {
                n for n, g in grads.items() if g is None
            }
            difference, where = largest_difference(_given(got), _given(grads))
            assert difference <= 1e-10, where
        report = fxmem.explain(net)
    assert report.executed_bodies
    return report


def _given(grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {n: g for n, g in grads.items() if g is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's, of an autograd function
@pytest.mark.parametrize("name", [n for n in zoo.ISSUE if n not in NAMED])
def test_exact(name: str) -> None:
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_refused_by_name(name: str) -> None:
    with pytest.raises((fxmem.CaptureError, fxmem.MutationError, fxmem.UnsupportedOpError)) as e:
        compare(name)
    assert e.value.source


RECURRENT = (
    "mamba2", "qwen3_next", "mamba", "falcon_mamba", "jamba", "bamba", "granitemoehybrid",
    "nemotron_h", "lfm2", "lfm3", "kimi_linear", "olmo_hybrid", "falcon_h1", "qwen3_5_text",
)  # fmt: skip
"""Types with states that run along the sequence."""


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in RECURRENT[2:]]


@pytest.mark.parametrize("name", [*RECURRENT[:2], *SLOW])
def test_recurrent_models_stream(name: str) -> None:
    """Exact, and no operator of theirs is a barrier."""
    assert not compare(name).barriers
