"""The pass that adds products in place: where it may, where it must not, and that values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxmem.passes.add_products import AddProducts
from fxmem.program import body_ops as runtime

aten = torch.ops.aten
Build = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node, fx.Node], fx.Node]


def body(build: Build) -> fx.GraphModule:
    graph = fx.Graph()
    x, a, b, buffer = (graph.placeholder(n) for n in ("x", "a", "b", "buffer"))
    own = graph.call_function(aten.mul.Tensor, (x, 2.0))
    graph.output((build(graph, own, a, b, buffer),))
    return fx.GraphModule(torch.nn.Module(), graph)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def plain(graph: fx.Graph, x: fx.Node, a: fx.Node, b: fx.Node, buffer: fx.Node) -> fx.Node:
    return call(graph, aten.add_.Tensor, x, call(graph, aten.mm.default, a, b))


def reshaped(graph: fx.Graph, x: fx.Node, a: fx.Node, b: fx.Node, buffer: fx.Node) -> fx.Node:
    wide = call(graph, aten.view.default, x, [2, 3, 5])
    product = call(graph, aten.view.default, call(graph, aten.mm.default, a, b), [2, 3, 5])
    return call(graph, aten.add_.Tensor, wide, product)


def twice_read(graph: fx.Graph, x: fx.Node, a: fx.Node, b: fx.Node, buffer: fx.Node) -> fx.Node:
    product = call(graph, aten.mm.default, a, b)
    return call(graph, aten.mul.Tensor, call(graph, aten.add_.Tensor, x, product), product)


def overwritten(graph: fx.Graph, x: fx.Node, a: fx.Node, b: fx.Node, buffer: fx.Node) -> fx.Node:
    rows = call(graph, runtime.take, buffer, 0, 0, 6)
    product = call(graph, aten.mm.default, rows, b)
    call(graph, runtime.put, buffer, a, 0, 0)
    return call(graph, aten.add_.Tensor, x, product)


def given() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((6, 5), (6, 4), (4, 5), (6, 4))
    return [torch.randn(*s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize(
    ("build", "fused"), [(plain, 1), (reshaped, 1), (twice_read, 0), (overwritten, 0)]
)
def test_values_stay(build: Build, fused: int) -> None:
    before = body(build)
    graph = AddProducts().run(before.graph)
    graph.lint()
    after = fx.GraphModule(torch.nn.Module(), graph)
    assert sum(n.target is runtime.plus_mm for n in graph.nodes) == fused
    assert not fused or not any(n.target is aten.mm.default for n in graph.nodes)
    torch.testing.assert_close(after(*given())[0], before(*given())[0], rtol=1e-12, atol=1e-12)


def test_a_product_that_reads_the_sum_is_left_alone() -> None:
    def build(graph: fx.Graph, x: fx.Node, a: fx.Node, b: fx.Node, buffer: fx.Node) -> fx.Node:
        square = call(graph, aten.mm.default, call(graph, aten.t.default, x), x)
        return call(graph, aten.add_.Tensor, x, call(graph, aten.mm.default, x, square))

    graph = AddProducts().run(body(build).graph)
    assert not any(n.target is runtime.plus_mm for n in graph.nodes)


def test_operands_that_cannot_be_added_to_in_one_product() -> None:
    x, a, b = torch.ones(3, 2).t(), torch.ones(2, 4), torch.ones(4, 3)
    assert torch.equal(runtime.plus_mm(x, a, b), torch.full((2, 3), 5.0))
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    assert torch.equal(runtime.plus_mm(half, a, b), torch.full((2, 3), 5.0, dtype=torch.bfloat16))
    empty = runtime.plus_mm(torch.ones(2, 3), torch.ones(2, 0), torch.ones(0, 3))
    assert torch.equal(empty, torch.ones(2, 3))
