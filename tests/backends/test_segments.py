"""Segments of a chunk body: where they end, whose memory they may take, which share code."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, fx

from fxmem._compat.inductor import Symbolic
from fxmem.backends.segment_code import _groups, code_for
from fxmem.backends.segment_form import Form
from fxmem.backends.segments import Segment, segments
from fxmem.program import body_ops as runtime

aten = torch.ops.aten


def chain() -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    out, x = graph.placeholder("out"), graph.placeholder("x")
    a = graph.call_function(aten.exp.default, (x,))
    b = graph.call_function(aten.neg.default, (a,))
    graph.call_function(runtime.put, (out, b, 0, 0))
    c = graph.call_function(aten.mul.Tensor, (a, b))
    d = graph.call_function(aten.add.Tensor, (c, x))
    graph.call_function(runtime.put, (out, d, 0, 0))
    graph.output(None)
    return graph, [a, b, c, d]


def test_a_write_ends_a_segment_and_dead_memory_is_given() -> None:
    graph, (a, b, c, d) = chain()
    first, second = (p for p in segments(graph) if isinstance(p, Segment))
    assert first.nodes == [a, b] and first.outputs == [a, b] and not first.donated
    assert second.nodes == [c, d] and second.outputs == [d]
    assert second.donated == {a, b}, "x is the caller's"


def test_memory_with_another_reader_is_not_given() -> None:
    graph, (a, b, c, d) = chain()
    (last,) = (n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(last):
        view = graph.call_function(aten.reshape.default, (b, [-1]))
        graph.call_function(runtime.put, (graph.find_nodes(op="placeholder")[0], view, 0, 0))
    second = [p for p in segments(graph) if isinstance(p, Segment)][1]
    assert second.donated == {a}


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_laid_out(order: tuple[int, ...]) -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    y: Tensor = runtime.laid_out(x, order)
    assert torch.equal(x, y) and y.permute(order).is_contiguous()
    assert runtime.laid_out(y, order) is y


def form(width: int, heads: int, name: str = "rows") -> Form:
    """``exp(x)`` of ``[rows, width]`` as ``[rows, heads, width / heads]``, times its rows."""
    graph = fx.Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    a = graph.call_function(aten.exp.default, (x,))
    b = graph.call_function(aten.reshape.default, (a, [n, heads, width // heads]))
    c = graph.call_function(aten.mul.Tensor, (b, n))
    graph.output(c)
    sizes = Symbolic.of({"other": 5, name: 9})
    rows, one = sympy.Symbol(name, integer=True), sympy.Integer(1)
    value = sizes.tensor(
        [rows, sympy.Integer(width)], [sympy.Integer(width), one], torch.float32,
        torch.device("cpu"),
    )  # fmt: skip
    part = Segment([a, b, c], [x, n], [c])
    return Form.of(part, {x: value, n: sizes.ints[name]}, sizes)


def test_constants_and_names_are_no_part_of_a_form() -> None:
    first, other = form(12, 3), form(20, 5, "length")
    assert first.key == other.key
    assert (first.constants, first.names) == ((12, 12, 3, 4), ["rows"])
    assert (other.constants, other.names) == ((20, 20, 5, 4), ["length"])
    assert _groups([first.constants], other.constants) == (0, 0, 1, -1)


def test_any_number_of_widths_takes_two_compilations() -> None:
    forms = [form(w, h) for w, h in ((12, 3), (20, 5), (28, 7), (8, 2), (12, 3))]
    codes = [code_for(f) for f in forms]
    assert len({id(c) for c in codes}) == 2 and codes[1] is codes[2] is codes[3]
    for (width, heads), one, code in zip(((20, 5), (28, 7), (8, 2)), forms[1:], codes[1:]):  # noqa: B905
        x = torch.randn(6, width)
        want = x.exp().reshape(6, heads, 4) * 6
        (got,) = code.compiled([6, *code.widths(one.constants), x.clone()])
        assert torch.allclose(got, want)
    assert not codes[1].serves(form(20, 4)), "heads of another size"
