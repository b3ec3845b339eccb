"""Copies and pickles of a transformed model stream as well, or say that they do not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from blocks_cases import STREAM, Small, ids, small
from torch import Tensor, nn

import fxmem
from fxmem import Blocks, FxmemWarning, NotTransformedError, Plan, PlanError, Stream

PLAN = Plan(stream=Stream(chunk=4, loss_chunk=4))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved,
    "twice": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "inside": lambda m: copy.deepcopy(nn.ModuleList([m]))[0],
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_streams_with_weights_of_its_own(way: str) -> None:
    plain, net = small(), fxmem.transform(small(), PLAN)
    net(ids(0)).backward()
    net.zero_grad()
    twin = WAYS[way](net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert type(twin) is Small
    loss = twin(ids(0, length=23))
    loss.backward()
    want = plain(ids(0, length=23))
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    for p, q in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in net.parameters())
    assert fxmem.explain(twin).executed_bodies > 0
    with pytest.raises(NotTransformedError):
        fxmem.restore(fxmem.restore(twin))


def test_a_restored_model_and_its_copies_are_plain() -> None:
    net = fxmem.restore(fxmem.transform(small(), PLAN))
    for model in (net, copy.deepcopy(net), saved(net)):
        with pytest.raises(NotTransformedError):
            fxmem.explain(model)


def test_the_plan_does_not_keep_a_model_alive() -> None:
    net = fxmem.transform(small(), PLAN)
    dead = weakref.ref(net)
    net(ids(0)).backward()
    torch._dynamo.reset()
    del net
    gc.collect()
    assert dead() is None


def test_a_copy_of_block_training_says_that_it_is_plain() -> None:
    net = fxmem.transform(small(), Plan(stream=STREAM, blocks=Blocks()))
    with pytest.warns(FxmemWarning, match="trains as plain PyTorch"):
        twin = copy.deepcopy(net)
    twin(ids(0)).backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_a_smaller_model_is_plain_and_says_nothing() -> None:
    net = tiny.model()
    masks = fxmem.Masks.full(fxmem.coupling(net))
    fxmem.transform(net, Plan(stream=STREAM, blocks=Blocks()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = fxmem.materialize(net, masks)
    with pytest.raises(NotTransformedError):
        fxmem.explain(made)


def test_the_default_plan_streams() -> None:
    net = fxmem.transform(small())
    net(ids(0)).backward()
    assert fxmem.explain(net).regions


class Module(nn.Module):
    """As trainers that call ``training_step`` want it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.small = small(), nn.Linear(2, 2)


class Inside(Module):
    def forward(self, ids: Tensor) -> Any:
        return self.net(ids)

    def training_step(self, batch: Tensor, index: int) -> Any:
        return self.shared(batch)

    def shared(self, batch: Tensor) -> Any:
        return self.net(batch) * 2


class Itself(Inside):
    def shared(self, batch: Tensor) -> Any:
        return self(batch) * 2


def test_a_module_whose_call_does_not_train_is_refused() -> None:
    for model in (Module(), Inside()):
        with pytest.raises(PlanError, match=r"fxmem.transform\(model.net, plan\)"):
            fxmem.transform(model, PLAN)
    model = fxmem.transform(Itself(), PLAN)
    assert isinstance(model, Itself)
    model.training_step(ids(0), 0).backward()
    assert fxmem.explain(model).executed_bodies > 0


def test_measure_and_mode() -> None:
    assert fxmem.measure.MIB == 2**20
    step = torch.compile(small(), backend="fxmem", mode="default")
    step(ids(0)).backward()
