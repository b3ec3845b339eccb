"""Sizes: one reading of an expression, whoever computes it, and divisions that are true."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.utils._sympy import functions as torch_sizes

from fxmem._compat.inductor import Symbolic
from fxmem.axes.size_calls import _FUNCTIONS, fold, operation
from fxmem.axes.sizes import T, divide, evaluate, linear, number, product, same, size
from fxmem.errors import CaptureError
from fxmem.streaming.loop_body import Ints

N = sympy.Symbol("n0", integer=True, positive=True)
CONSTANTS = st.integers(1, 9).map(sympy.Integer)
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul,
    "floor": lambda a, b: torch_sizes.FloorDiv(a, b), "max": torch_sizes.Max,
    "min": torch_sizes.Min, "mod": lambda a, b: torch_sizes.PythonMod(a, b),
    "power": lambda a, b: torch_sizes.PowByNatural(a, sympy.Integer(2)),
}  # fmt: skip


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> Any:
    """Integer expressions as Dynamo records them: divisors are constants."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from([T, N]) | CONSTANTS)
    name = draw(st.sampled_from(sorted(BINARY)))
    left = draw(expressions(depth=depth - 1))
    right = draw(CONSTANTS if name in ("floor", "mod") else expressions(depth=depth - 1))
    return BINARY[name](left, right)


@st.composite
def reals(draw: st.DrawFn) -> Any:
    """Numbers computed from sizes: factors, divisors, and sizes that are rounded from them."""
    inner = torch_sizes.ToFloat(torch_sizes.Max(1, draw(expressions(depth=2))))
    kinds: list[Callable[[Any], Any]] = [
        torch_sizes.OpaqueUnaryFn_sqrt, torch_sizes.OpaqueUnaryFn_log2,
        torch_sizes.OpaqueUnaryFn_tanh,
        lambda x: torch_sizes.FloatPow(x, sympy.Float(-0.5)),
        lambda x: torch_sizes.FloatTrueDiv(sympy.Float(1.0), x),
        lambda x: torch_sizes.IntTrueDiv(sympy.Integer(3), T),
        lambda x: torch_sizes.CeilToInt(x * 0.5), lambda x: torch_sizes.FloorToInt(x * 0.5),
        lambda x: torch_sizes.TruncToInt(x * 0.5), lambda x: torch_sizes.TruncToFloat(x * 0.5),
        lambda x: torch_sizes.RoundToInt(x * 0.25),
        lambda x: torch_sizes.Where(sympy.Lt(T, 5), x, torch_sizes.ToFloat(N)),
        lambda x: x * 0.5 + 1.25,
    ]  # fmt: skip
    return draw(st.sampled_from(kinds))(inner)


def emitted(expr: Any, env: dict[str, int]) -> Any:
    """The value of ``expr`` by the graph that a body would contain."""
    graph = fx.Graph()
    ints = Ints(graph, list(env))
    graph.output(ints(expr))
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)(*env.values())


def exact(expr: Any, env: dict[str, int]) -> Any:
    """The value of ``expr`` by sympy."""
    return expr.xreplace({s: sympy.Integer(env[str(s)]) for s in expr.free_symbols})


@settings(max_examples=150)
@given(expressions() | reals(), st.integers(1, 40), st.integers(1, 5))
def test_numbers_graphs_and_sympy_agree(expr: Any, length: int, batch: int) -> None:
    env = {"T": length, "n0": batch}
    want = exact(expr, env)
    got = number(expr, env)
    assert isinstance(got, float) or sympy.Integer(got) == want
    assert abs(got - float(want)) <= 1e-12 * max(1.0, abs(got))
    assert emitted(expr, env) == got


@settings(max_examples=60)
@given(expressions() | reals(), st.integers(2, 40), st.integers(2, 5))
def test_a_trace_with_symbolic_sizes_keeps_the_expression(
    expr: Any, length: int, batch: int
) -> None:
    """Nothing is fixed to the value it has in the trace, and no guard but ranges is made."""
    sizes = Symbolic.of({"T": length, "n0": batch})
    value = fold(expr, {s: sizes.ints[str(s)] for s in expr.free_symbols})
    assert not sizes.guards()
    again = {"T": length + 7, "n0": batch + 1}
    assert abs(number(sizes.expr(value), again) - number(expr, again)) < 1e-9


@settings(max_examples=150)
@given(expressions(), expressions(), st.integers(1, 30), st.integers(1, 4))
def test_a_quotient_times_the_divisor_is_the_dividend(a: Any, b: Any, t: int, n: int) -> None:
    env = {"T": t, "n0": n}
    found = divide(a, b)
    if found is not None:
        assert evaluate(found, env) * evaluate(b, env) == evaluate(a, env)
    if b != 0:
        whole = divide(product((a, b)), b)
        assert whole is None or evaluate(whole, env) * evaluate(b, env) == evaluate(a * b, env)


@settings(max_examples=100)
@given(expressions(), st.integers(1, 30), st.integers(1, 4))
def test_a_linear_size_is_the_sum_of_its_parts(expr: Any, t: int, n: int) -> None:
    parts = linear(expr)
    if parts is not None:
        a, b = (evaluate(p, {"n0": n}) for p in parts)
        assert a * t + b == evaluate(expr, {"T": t, "n0": n})


def test_products_with_any_size_are_divided() -> None:
    half = torch_sizes.FloorDiv(T, 2)
    few = torch_sizes.Min(3, T)
    assert divide(N * half * few, few) == N * half
    assert divide(half, T) is None
    assert divide(sympy.Integer(0), sympy.Integer(0)) is None
    assert divide(T, sympy.Integer(0)) is None
    assert same(product((half, few)), few * half)
    assert linear(half) is None
    assert linear(few * T) is None
    assert linear(N * T - 2) == (N, -2)


def test_every_size_function_of_torch_is_known() -> None:
    found = {
        n for n, c in vars(torch_sizes).items()
        if isinstance(c, type) and issubclass(c, sympy.Function)
        and c.__module__ == torch_sizes.__name__
    }  # fmt: skip
    # classes that make others, and a question about strides that no size asks
    found -= {"CeilDiv", "IsNonOverlappingAndDenseIndicator", "BitwiseFn", "OpaqueUnaryFn"}
    assert len(found) > 20
    assert found <= set(_FUNCTIONS)


def test_a_function_that_is_not_known_is_an_error_that_names_it() -> None:
    with pytest.raises(CaptureError, match="`LambertW`"):
        operation(sympy.LambertW(T))


def test_a_quotient_that_comes_out_even() -> None:
    rows = torch_sizes.FloorDiv(N, sympy.Integer(8))
    assert size(torch_sizes.FloorDiv(rows**2, rows) + 1) == rows + 1
    assert size(torch_sizes.FloorDiv(rows**2 + 1, rows)) != rows
