"""Layers that share a trace: the private names behind it, and what the graph then holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fxmem._compat import repeated_layers as _compat
from fxmem._compat.tracing import on_capture


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(3, 3), 2

    def forward(self, x: torch.Tensor, pair: Any = None) -> torch.Tensor:
        return self.inner(x) * pair[0] * self.factor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, pair=(x.cos(), x.sin()))
        return x


@pytest.mark.skipif(not _compat.AVAILABLE, reason="PyTorch before 2.13")
def test_one_trace_stands_for_others_under_guards_of_their_own() -> None:
    seen: list[fx.GraphModule] = []
    begun: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    net = Net().requires_grad_(False)
    layers = _compat.Sharing(lambda: {id(m): "kind" for m in net.layers})
    call = torch.compile(net._call_impl, backend=backend, fullgraph=True)
    x = torch.randn(2, 3)
    for _ in range(3):
        with _compat.sharing(layers), on_capture(lambda: begun.append(True)):
            call(x)
        calls = list(filter(_compat.is_shared_call, seen[-1].graph.nodes))
        names = [_compat.layer_of(n).rpartition(".")[2] for n in calls]
        assert names == ["0", "1", "2"]
    assert len(seen) == 1 and len(begun) == 1 and (layers.traced, layers.stamped) == (1, 2)
    net.layers[2].factor = 3  # a number of a layer that was not traced
    with _compat.sharing(layers):
        call(x)
    assert len(seen) == 2 and (layers.traced, layers.stamped) == (3, 3)
    call(x)
    assert len(seen) == 2


class Again(nn.Module):
    """Layers in an order in which they may come again, some with another argument."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.layers, self.order = nn.ModuleList(Layer() for _ in range(3)), order

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            given = y if name.islower() else z
            x = self.layers["abc".index(name.lower())](given, pair=(x.cos(), x.sin()))
        return x


@pytest.mark.skipif(not _compat.AVAILABLE, reason="PyTorch before 2.13")
@pytest.mark.parametrize("order", ["aab", "aabb", "aAb", "aAB", "abaB", "aAbBa"])
def test_layers_that_come_again_are_guarded_like_others(order: str) -> None:
    torch._dynamo.reset()
    net = Again(order).requires_grad_(False)
    layers = _compat.Sharing(lambda: {id(m): "kind" for m in net.layers})
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    call = torch.compile(net._call_impl, backend=backend, fullgraph=True)
    given = torch.randn(3, 2, 3).unbind()
    for factor in (2, 3):  # of a layer that was not traced
        net.layers[1].factor = factor
        for _ in range(2):
            with _compat.sharing(layers):
                assert torch.equal(call(*given), net(*given))
    assert len(seen) == 2


class TwoWays(Layer):
    """A layer that reads another number where it is called in another way."""

    other = 5

    def forward(self, x: torch.Tensor, pair: Any = None) -> torch.Tensor:
        return self.inner(x) * (self.factor if pair is None else self.other)


@pytest.mark.skipif(not _compat.AVAILABLE, reason="PyTorch before 2.13")
@pytest.mark.parametrize("name", ["factor", "other"])
def test_a_layer_that_is_called_in_two_ways_is_guarded_in_both(name: str) -> None:
    torch._dynamo.reset()
    net = nn.ModuleList(TwoWays() for _ in range(2)).requires_grad_(False)
    layers = _compat.Sharing(lambda: {id(m): "kind" for m in net})

    def run(x: torch.Tensor) -> torch.Tensor:
        for given in ((), (x,)):
            for layer in net:
                x = layer(x, *given)
        return x

    call = torch.compile(run, backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    for value in (2, 3):
        setattr(net[1], name, value)  # of a layer that was not traced
        with _compat.sharing(layers):
            assert torch.equal(call(x), run(x))
    assert layers.stamped >= 2


@pytest.mark.skipif(not _compat.AVAILABLE, reason="PyTorch before 2.13")
def test_outside_of_the_context_nothing_is_shared() -> None:
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Net()._call_impl, backend=backend, fullgraph=True)(torch.randn(2, 3))
    assert not any(map(_compat.is_shared_call, seen[0].graph.nodes))
