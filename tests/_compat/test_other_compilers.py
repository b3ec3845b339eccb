"""A transformed model under another compiler streams as it does alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import twins
from torch import Tensor, nn

import fxmem
from fxmem import FxmemWarning
from fxmem.runtime.counters import COUNTER

Made = Callable[[nn.Module, Any], Any]


def of_model(net: nn.Module, backend: Any) -> Any:
    return torch.compile(net, backend=backend)


def of_a_step(net: nn.Module, backend: Any) -> Any:
    return torch.compile(lambda ids: net(ids), backend=backend)


def in_place(net: nn.Module, backend: Any) -> Any:
    with pytest.warns(FxmemWarning, match=r"compile\(\) changes nothing"):
        net.compile(backend=backend)
    return net


OURS = fxmem.backend(twins.PLAN)
CASES = [("eager", of_a_step)]
LATER = [("eager", of_model), ("eager", in_place), (OURS, of_model), (OURS, of_a_step),
         (OURS, in_place)]  # fmt: skip


@pytest.mark.parametrize(
    "backend, made", [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in LATER)]
)
def test_it_streams(made: Made, backend: Any) -> None:
    torch._dynamo.reset()
    plain, streamed = twins.pair()
    call, before = made(streamed, backend), COUNTER.bodies
    for given in (twins.ids(), twins.ids(length=17)):
        for net, run in ((plain, plain), (streamed, call)):
            net.zero_grad()
            run(given)["loss"].backward()
        twins.same_gradients(streamed, plain)
    assert COUNTER.bodies - before > 20


def test_a_whole_graph_is_refused_by_name() -> None:
    torch._dynamo.reset()
    _, streamed = twins.pair()

    def step(ids: Tensor) -> Any:
        return streamed(ids)["loss"]

    with pytest.raises(torch._dynamo.exc.Unsupported, match="streams this model by itself"):
        torch.compile(step, backend="eager", fullgraph=True)(twins.ids())
    engine = fxmem.backend(twins.PLAN)
    torch.compile(step, backend=engine, fullgraph=True)(twins.ids()).backward()
    assert fxmem.explain(engine).captures == 1


def test_compile_is_as_before_for_other_modules() -> None:
    net = nn.Linear(2, 2)
    net.compile(backend="eager")
    assert net._compiled_call_impl is not None and net(torch.ones(1, 2)).shape == (1, 2)
