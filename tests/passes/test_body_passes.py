"""Rewrites of chunk bodies and of traced regions change no bit of a result."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxmem.axes.signature import TensorInfo
from fxmem.frontend.joint import Joint
from fxmem.passes.in_place import InPlace
from fxmem.passes.order_by_memory import OrderByMemory
from fxmem.passes.simplify import Simplify
from fxmem.program import body_ops as runtime

aten = torch.ops.aten
ROWS, COLUMNS = 3, 4
UNARY = (aten.neg.default, aten.exp.default, aten.sigmoid.default, aten.silu.default)
SOFTMAX_BACKWARD = (
    aten._softmax_backward_data.default, aten._log_softmax_backward_data.default
)  # fmt: skip
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)


def body(seed: int, length: int) -> fx.Graph:
    """A random line of pointwise ops, products, views and writes, as a chunk body has them."""
    draw = random.Random(seed)
    graph = fx.Graph()
    out, *inputs = (graph.placeholder(f"x{i}") for i in range(3))
    values: dict[fx.Node, tuple[int, ...]] = {n: (ROWS, COLUMNS) for n in inputs}

    def call(target: object, args: tuple[object, ...], shape: tuple[int, ...]) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["info"] = TensorInfo(shape, torch.float64)  # type: ignore[arg-type]
        values[node] = shape
        return node

    for _ in range(length):
        a = draw.choice(list(values)[-4:])
        same = [n for n, s in values.items() if s == values[a]]
        b = draw.choice(same[-4:])
        rows, columns = values[a]
        kind = draw.randrange(10)
        if kind < 2:
            call(draw.choice(UNARY), (a,), values[a])
        elif kind < 5:
            call(draw.choice(BINARY), (a, b), values[a])
        elif kind == 5:
            call(aten.t.default, (a,), (columns, rows))
        elif kind == 8:
            call(draw.choice(SOFTMAX_BACKWARD), (a, b, -1, torch.float64), values[a])
        elif kind == 9:
            index = graph.call_function(aten.argsort.default, (b,))
            call(aten.scatter_add.default, (a, -1, index, b), values[a])
        elif kind == 6:
            call(aten.reshape.default, (a, [columns, rows]), (columns, rows))
        else:
            half = call(aten.slice.Tensor, (a, 0, 0, rows - 1), (rows - 1, columns))
            values[graph.call_function(runtime.pad_rows, (half, 0, 0, 0))] = (rows - 1, columns)
    # the order of a sum follows the memory layout, which may differ
    dense = {"memory_format": torch.contiguous_format}
    last = [graph.call_function(aten.clone.default, (n,), dense) for n in list(values)[-3:]]
    sums = [graph.call_function(aten.sum.default, (n,)) for n in last]
    for i, total in enumerate(sums):
        row = graph.call_function(aten.reshape.default, (total, [1]))
        graph.call_function(runtime.put, (out, row, 0, i))
    graph.output(None)
    return graph


def run(graph: fx.Graph) -> torch.Tensor:
    out = torch.zeros(3, dtype=torch.float64)
    torch.manual_seed(0)
    given = [torch.rand(ROWS, COLUMNS, dtype=torch.float64) for _ in range(2)]
    kept = [x.clone() for x in given]
    fx.GraphModule(torch.nn.Module(), graph)(out, *given)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), "an input was written"
    return out


@pytest.mark.parametrize("passes", [(InPlace(),), (OrderByMemory(), InPlace())])
@given(st.integers(0, 10**9), st.integers(3, 14))
@settings(max_examples=150, deadline=None)
def test_rewrites_in_place_change_no_bit(passes: tuple[Any, ...], seed: int, length: int) -> None:
    plain, edited = run(body(seed, length)), body(seed, length)
    for one in passes:
        edited = one.run(edited)
    torch.testing.assert_close(run(edited), plain, rtol=0, atol=0, equal_nan=True)


def writing_body(seed: int, length: int) -> fx.Graph:
    """Rows of three arguments are read, worked on and written, in any order."""
    draw = random.Random(seed)
    graph = fx.Graph()
    arguments = [graph.placeholder(f"x{i}") for i in range(3)]
    values: list[fx.Node] = []
    for _ in range(length):
        kind = draw.randrange(4)
        if kind == 0 or not values:
            args: tuple[object, ...] = (draw.choice(arguments), 0, draw.randrange(ROWS), 1)
            new = graph.call_function(runtime.take, args)  # type: ignore[arg-type]
        elif kind == 1:
            new = graph.call_function(draw.choice(UNARY), (draw.choice(values),))
        elif kind == 2:
            operands = (draw.choice(values), draw.choice(values))
            new = graph.call_function(draw.choice(BINARY), operands)
        else:
            row = (draw.choice(arguments), draw.choice(values), 0, draw.randrange(ROWS))
            graph.call_function(runtime.put, row)
            continue
        rows = draw.choice((1, 1, 5, 50))  # sizes that the order goes by
        new.meta["info"] = TensorInfo((rows, COLUMNS), torch.float64)  # type: ignore[arg-type]
        values.append(new)
    graph.output(None)
    return graph


@given(st.integers(0, 10**9), st.integers(4, 25), st.booleans())
@settings(max_examples=300, deadline=None)
def test_another_order_keeps_what_is_written(seed: int, length: int, one: bool) -> None:
    """Also where two arguments are one tensor."""
    found = []
    for graph in (writing_body(seed, length), OrderByMemory().run(writing_body(seed, length))):
        torch.manual_seed(0)
        given = [torch.rand(ROWS, COLUMNS, dtype=torch.float64) for _ in range(3)]
        given[1] = given[0] if one else given[1]
        fx.GraphModule(torch.nn.Module(), graph)(*given)
        found.append(torch.cat(given))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_the_second_reader_comes_first_where_the_other_can_write_in_place() -> None:
    """``p * a + p * b``, of which both ``a`` and ``b`` are made of ``p``: three wide values, not
    four.
    """
    graph = fx.Graph()
    out, x = graph.placeholder("out"), graph.placeholder("x")

    def call(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["info"] = TensorInfo((3,), torch.float64)  # type: ignore[arg-type]
        return node

    p = call(aten.exp.default, x)
    log = call(aten.log.default, p)
    scaled = call(aten.mul.Tensor, p, 3.0)
    wide = call(aten.mul.Tensor, log, 2.0)
    product = call(aten.mul.Tensor, wide, p)
    total = call(aten.add.Tensor, scaled, product)
    graph.call_function(runtime.put, (out, call(aten.sub.Tensor, total, log), 0, 0))
    graph.output(None)
    ordered = InPlace().run(OrderByMemory().run(graph))
    assert "aten.mul.Tensor" in targets(InPlace().run(graph))[3:]
    assert targets(ordered)[3:] == ["aten.mul_.Tensor", "aten.mul_.Tensor", "aten.add_.Tensor",
                                    "aten.sub_.Tensor"]  # fmt: skip


def targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("aten")]


def test_in_place_rewrites_what_dies() -> None:
    edited = fx.Graph()
    out, x = edited.placeholder("out"), edited.placeholder("x")
    made = edited.call_function(aten.neg.default, (x,))
    again = edited.call_function(aten.exp.default, (made,))
    for n in (made, again):
        n.meta["info"] = TensorInfo((3,), torch.float64)  # type: ignore[arg-type]
    edited.call_function(runtime.put, (out, again, 0, 0))
    edited.output(None)
    assert targets(InPlace().run(edited)) == ["aten.neg.default", "aten.exp_.default"]
    assert targets(edited) == ["aten.neg.default", "aten.exp.default"], "a pass edited its input"


def test_in_place_leaves_what_is_read_later() -> None:
    graph = fx.Graph()
    out, x = graph.placeholder("out"), graph.placeholder("x")
    made = graph.call_function(aten.neg.default, (x,))
    view = graph.call_function(aten.reshape.default, (made, [3]))
    again = graph.call_function(aten.exp.default, (made,))
    for n in (made, view, again):
        n.meta["info"] = TensorInfo((3,), torch.float64)  # type: ignore[arg-type]
    graph.call_function(runtime.put, (out, again, 0, 0))
    graph.call_function(runtime.put, (out, view, 0, 0))
    graph.output(None)
    assert "aten.exp_.default" not in targets(InPlace().run(graph))


@pytest.mark.parametrize("ours", (runtime.pad_rows,))
def test_in_place_follows_no_unknown_alias(ours: object) -> None:
    """A function may return its argument; what it was given is not written any more."""
    graph = fx.Graph()
    out, x = graph.placeholder("out"), graph.placeholder("x")
    made = graph.call_function(aten.neg.default, (x,))
    alias = graph.call_function(ours, (made, 0, 0, 0))  # type: ignore[arg-type]
    again = graph.call_function(aten.exp.default, (made,))
    for n in (made, again):
        n.meta["info"] = TensorInfo((3,), torch.float64)  # type: ignore[arg-type]
    graph.call_function(runtime.put, (out, alias, 0, 0))
    graph.call_function(runtime.put, (out, again, 0, 0))
    graph.output(None)
    assert "aten.exp_.default" not in targets(InPlace().run(graph))


def norm_and_rotation(x: Tensor, weight: Tensor, turn: Tensor) -> list[Tensor]:
    """Gradients of an RMS norm followed by half a rotary embedding, as autograd writes them."""
    x = x.detach().requires_grad_()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    normed = torch.ops.aten.slice.Tensor(normed, 0)
    half = x.shape[-1] // 2
    rotated = normed * turn + torch.cat((-normed[..., half:], normed[..., :half]), -1) * turn
    return list(torch.autograd.grad(rotated.square().sum(), (x,)))


def test_simplify_changes_no_bit_and_removes_work() -> None:
    torch.manual_seed(0)
    args = tuple(torch.randn(5, 8, dtype=torch.float64) for _ in range(3))
    plain = make_fx(norm_and_rotation)(*args)
    (output,) = plain.graph.find_nodes(op="output")
    values = {n: n.meta.get("val") for n in plain.graph.nodes}
    info = {n: TensorInfo(v.shape, v.dtype) for n, v in values.items() if isinstance(v, Tensor)}
    inputs = list(plain.graph.find_nodes(op="placeholder"))
    grads = list(output.args[0])
    joint = Joint(
        plain.graph, plain, [], inputs[:2], inputs[2], [], [], grads, info, {}, False, set()
    )
    traced = Simplify().run(joint)
    traced.module.recompile()
    (got,), (want,) = traced.module(*args), plain(*args)
    assert torch.equal(got, want)
    left = [str(n.target) for n in traced.graph.nodes]
    assert "aten.slice_backward.default" not in left and "aten.detach.default" not in left
    assert left.count("aten.pow.Tensor_Scalar") < [str(n.target) for n in plain.graph.nodes].count(
        "aten.pow.Tensor_Scalar"
    )
