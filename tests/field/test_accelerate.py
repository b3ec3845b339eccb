"""accelerate, unmodified: a model transformed before or after ``prepare`` trains as a plain one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from double import largest_difference
from lightning.fabric import Fabric
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.runtime.counters import COUNTER

PLAN = Plan(stream=Stream(chunk=8))
BATCHES = [tiny.batch(2, n) for n in (23, 31, 24, 23)]


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """accelerate keeps the options of the first accelerator of a process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def trained(how: str, folder: Path | None = None, **options: Any) -> dict[str, Tensor]:
    """Weights after two steps of two batches each; ``how``: when the model is transformed."""
    model = tiny.model()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    if how == "before":
        fxmem.transform(model, PLAN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    net, optimizer = accelerator.prepare(model, optimizer)
    if how == "after":
        fxmem.transform(net, PLAN)
    for batch in BATCHES:
        with accelerator.accumulate(net):
            accelerator.backward(net(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    if folder is not None:
        accelerator.save_state(str(folder))
        accelerator.backward(net(**BATCHES[0]).loss)
        optimizer.step()
        accelerator.load_state(str(folder))
        assert largest_difference(dict(model.named_parameters()), weights)[0] == 0.0
    return weights


@pytest.mark.parametrize("how", ["before", pytest.param("after", marks=pytest.mark.field)])
def test_weights_after_two_accumulated_steps(how: str, tmp_path: Path) -> None:
    want = trained("")
    before = COUNTER.bodies
    assert largest_difference(trained(how, tmp_path), want)[0] < 2e-6
    assert COUNTER.bodies > before


@pytest.mark.field
def test_the_backend_by_name() -> None:
    want = trained("")
    AcceleratorState._reset_state(True)
    before = COUNTER.bodies
    assert largest_difference(trained("", dynamo_backend="fxmem"), want)[0] < 2e-6
    assert COUNTER.bodies > before


@pytest.mark.field
def test_autocast_rounds_as_in_a_plain_run() -> None:
    exact = trained("")
    AcceleratorState._reset_state(True)
    errors = []
    for how in ("", "before"):
        found = trained(how, mixed_precision="bf16")
        errors.append(sum(float((found[n] - w).square().sum()) for n, w in exact.items()) ** 0.5)
    assert 0 < errors[1] <= 1.1 * errors[0]


@pytest.mark.field
@pytest.mark.parametrize("how", ["before", "inside", "outside"])
def test_fabric(how: str) -> None:
    """Lightning's Fabric: transformed before ``setup``, and after it the model or its wrapper."""
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = tiny.model()
    model: nn.Module = copy.deepcopy(plain)
    if how == "before":
        fxmem.transform(model, PLAN)
    net, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    if how != "before":
        fxmem.transform(net if how == "outside" else model, PLAN)
    before = COUNTER.bodies
    fabric.backward(net(**BATCHES[0]).loss)
    plain(**BATCHES[0]).loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (model, plain)]
    assert largest_difference(*grads)[0] < 2e-6 and COUNTER.bodies > before
