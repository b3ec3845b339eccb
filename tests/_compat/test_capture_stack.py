"""Probes of the private names behind parts that run as they are, and behind wrapped weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmem._compat import capture_stack, graph, overrides, wrapped
from fxmem._compat.errors import frames


class Part(nn.Module):
    def helper(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + 1  # type: ignore[no-any-return]


def failure(net: Any, x: Tensor) -> BaseException:
    torch._dynamo.maybe_mark_dynamic(x, 0)
    with graph.capture_config(), pytest.raises(Exception) as caught:  # noqa: PT011
        torch.compile(net, backend="eager", fullgraph=True)(x)
    return caught.value


def test_the_innermost_caller_comes_first_with_its_object() -> None:
    net = Whole()
    found = capture_stack.callers(failure(net, torch.randn(5)))
    named = [(owner, code.co_name) for owner, code in found]
    assert named[:2] == [(net.part, "helper"), (net.part, "forward")]
    assert named[-1] == (net, "forward")
    assert list(frames(ValueError())) == []


def test_a_call_is_one_node_with_the_sizes_of_its_stand_ins() -> None:
    calls: list[Any] = []

    def run(stands: Any, args: Any, kwargs: Any) -> list[Tensor]:
        calls.append((args, kwargs))
        return [args[0] * kwargs["by"]]

    node = capture_stack.piece_call(run)
    stand = capture_stack.stand_in([4, 3], [3, 1], torch.float32, torch.device("cpu"), True, [0])
    assert capture_stack.is_stand_in(stand)
    assert stand.untyped_storage().nbytes() == 0
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    def fn(x: Tensor) -> Tensor:
        return node([stand], (x,), {"by": 2})[0] + 1  # type: ignore[no-any-return]

    x = torch.randn(4, 3)
    assert torch.equal(torch.compile(fn, backend=backend, fullgraph=True)(x), x * 2 + 1)
    (one,) = [n for n in graphs[0].graph.nodes if capture_stack.is_piece(n)]
    (value,) = one.meta["example_value"]
    assert isinstance(value.shape[0], torch.SymInt)
    assert value.requires_grad
    assert calls[0][1] == {"by": 2}


def test_parts_of_a_wrapped_tensor_make_it_again() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    inner = TwoTensor(torch.randn(2, 3), torch.randn(2, 3))
    outer = TwoTensor(inner, TwoTensor(torch.randn(2, 3), torch.randn(2, 3)))
    found = wrapped.parts(outer)
    assert len(found) == 4
    again = wrapped.together(outer, [t * 2 for t in found])
    assert all(torch.equal(a, b * 2) for a, b in zip(wrapped.parts(again), found, strict=True))
    assert wrapped.described(outer) == wrapped.described(again) != wrapped.described(inner)
    assert not wrapped.is_wrapped(torch.ones(2))
    assert not wrapped.is_wrapped(nn.Parameter(torch.ones(2)))


def test_the_names_of_what_a_capture_reads() -> None:
    seen: list[str] = []

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)
            self.inner.scale = 3  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.inner.scale

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(capture_stack.sources())
        return gm.forward

    assert capture_stack.sources() == []
    torch._dynamo.reset()
    torch.compile(Outer(), backend=backend)(torch.ones(1, 2))
    assert any(name.endswith("._modules['inner'].scale") for name in seen)


def test_a_call_tells_what_it_writes() -> None:
    kept = torch.zeros(2)
    node = capture_stack.piece_call(lambda *_: [], [kept])
    graph = torch.fx.Graph()
    graph.call_function(node, ([], (), {}))
    (found,) = capture_stack.written(graph.nodes)
    assert found is kept


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.kept, self.calls = torch.zeros(2), 3
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.kept.data.add_(1)
        return x * self.weight * self.calls


def test_what_modules_hold_is_told_from_what_a_call_is_given() -> None:
    held: dict[str, bool] = {}
    calls: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            held[graph.input_name(node)] = capture_stack.is_held(node)
        calls.extend(n.target for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Counting(), backend=backend, fullgraph=True)(torch.ones(2))
    assert held == {"count": True, "kept": True, "weight": False, "x": False}
    assert overrides.DATA in calls


def test_a_number_that_is_a_symbol() -> None:
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append([v for v in inputs if not isinstance(v, Tensor)])
        return gm.forward

    for patterns in ([], [r"L\['\w+'\]\.calls\Z"]):
        torch._dynamo.reset()
        with capture_stack.dynamic_sources(patterns):
            torch.compile(Counting(), backend=backend, fullgraph=True)(torch.ones(2))
    assert [len(values) for values in found] == [0, 1]
