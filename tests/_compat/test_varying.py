"""Sizes that a capture takes for symbolic."""

from __future__ import annotations

from typing import Any

import torch
from captures import capture
from torch import Tensor, fx, nn

from fxmem._compat import varying


def test_mark_dynamic_gives_symbolic_sizes_and_says_what_is_new() -> None:
    tensor = torch.randn(1, 7, 3)
    assert varying.mark_dynamic(tensor) == [1, 2]
    assert varying.mark_dynamic(tensor) == []
    assert tensor._dynamo_weak_dynamic_indices == {1, 2}
    _, inputs = capture(lambda x: x * 2, tensor)
    assert sum(isinstance(value, torch.SymInt) for value in inputs) == 2


def test_marked_inputs_leave_out_parameters_and_buffers() -> None:
    module, given = nn.BatchNorm1d(4).eval(), torch.randn(3, 4)
    seen: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        # Asked in here: Dynamo forgets where inputs came from when the backend returns.
        seen.append(varying.mark_inputs(gm, example_inputs))
        marked = [hasattr(v, "_dynamo_weak_dynamic_indices") for v in example_inputs]
        assert (len(marked), sum(marked)) == (5, 1)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(given)
    assert seen == [True]
    assert given._dynamo_weak_dynamic_indices == {0, 1}


def test_marking_tells_sizes_that_are_symbolic_already() -> None:
    seen: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append(varying.mark_inputs(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    call = torch.compile(lambda x, y: x.sum() + y.sum(), backend=backend, dynamic=True)
    call(torch.randn(5), torch.randn(7))
    assert seen == [False]


def test_mark_axis_dynamic_makes_one_axis_symbolic() -> None:
    seen: list[torch.Size] = []

    def record(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.extend(
            n.meta["example_value"].shape for n in gm.graph.nodes
            if n.op == "placeholder" and isinstance(n.meta["example_value"], torch.Tensor)
        )  # fmt: skip
        return gm.forward

    tensor = torch.ones(4, 6)
    varying.mark_axis_dynamic(tensor, 1)
    torch.compile(lambda t: t * 2, backend=record)(tensor)
    assert [isinstance(n, torch.SymInt) for n in seen[0]] == [False, True]


def test_what_a_model_holds_varies_with_the_arguments_alone() -> None:
    """A mask that is set for every call does, numbers of virtual tokens do not."""

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask, self.tokens = torch.ones(3, 7), {"default": torch.arange(5)}
            self.weights, self.shifted = torch.ones(3), torch.ones(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            own = self.mask.sum() + self.tokens["default"].sum()
            return x + own + self.weights.sum() + self.shifted.sum()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        varying.mark_inputs(gm, example_inputs)
        return gm.forward

    net = Holds()
    torch._dynamo.reset()
    torch.compile(net, backend=backend, fullgraph=True)(torch.ones(3, 7))
    marked = [
        getattr(t, "_dynamo_weak_dynamic_indices", set())
        for t in (net.mask, net.tokens["default"], net.weights, net.shifted)
    ]
    assert marked == [{0, 1}, set(), set(), {0, 1}]
