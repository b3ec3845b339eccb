"""Private names of DistributedDataParallel, on a group of one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fxmem._compat import ddp

DDP = nn.parallel.DistributedDataParallel
OPTIONS: list[dict[str, bool]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Watched(nn.Module):
    """Notes which wrapper it runs in; it has a buffer, which the wrapper sends."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(2, 1), list[Any]()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wrapper = ddp.active()
        self.seen.append(wrapper and (wrapper, ddp.syncs(wrapper)))
        out: torch.Tensor = self.inner(x)
        return out


@pytest.mark.usefixtures("group")
def test_the_wrapper_that_runs_and_no_sync() -> None:
    model = Watched()
    net = DDP(model)
    model(torch.ones(1, 2))
    net(torch.ones(1, 2))
    with net.no_sync():
        net(torch.ones(1, 2))
    assert model.seen == [None, (net, True), (net, False)]
    assert ddp.active() is None


def _error(name: str) -> Exception:
    return ZeroDivisionError(name)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("options", OPTIONS)
def test_a_disarmed_wrapper_reduces_nothing(options: dict[str, bool]) -> None:
    """Also where it is disarmed inside its forward; its buckets are gone."""
    model, checked = Watched(), list[None]()
    net = DDP(model, **options)
    reducer = weakref.ref(net.reducer)
    hook = model.register_forward_pre_hook(
        lambda *_: ddp.disarm(net, lambda: checked.append(None), _error)
    )
    for step in range(3):
        net(torch.ones(1, 2)).sum().backward()
        assert len(checked) == step
    ddp.disarm(net, lambda: None, _error)
    hook.remove()
    gc.collect()
    assert reducer() is None
    assert model.inner.weight.grad is not None
    assert torch.equal(model.inner.weight.grad, torch.full((1, 2), 3.0))
    with pytest.raises(ZeroDivisionError, match="comm_hook"):
        net.register_comm_hook(None, lambda state, bucket: None)


@pytest.mark.usefixtures("group")
def test_what_is_in_the_way() -> None:
    net = DDP(Watched())
    assert ddp.options_in_the_way(net) is None
    with net.join():
        assert ddp.options_in_the_way(net) == "join()"
    net.register_comm_hook(None, lambda state, bucket: None)
    assert ddp.options_in_the_way(net) == "register_comm_hook(...)"
    from torch.nn.parallel.distributed import _MixedPrecision

    half = DDP(Watched(), mixed_precision=_MixedPrecision(param_dtype=torch.float16))
    assert ddp.options_in_the_way(half) == "mixed_precision=..."
