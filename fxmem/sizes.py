"""Symbolic sizes: the small amount of integer algebra that labels and programs need.

A size is a Python ``int`` or a sympy expression over canonical symbols: ``T`` is the streamed
length, all other symbols (``n0``, ``n1``, ...; usually the batch) stay whole. Sizes never carry
values of a particular call; :func:`evaluate` turns them into integers when a program runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch

T = sympy.Symbol("T", integer=True, positive=True)
LO = sympy.Symbol("lo", integer=True, nonnegative=True)
HI = sympy.Symbol("hi", integer=True, positive=True)

Size: TypeAlias = sympy.Expr
ZERO: Size = sympy.Integer(0)
UNIT: Size = sympy.Integer(1)


def size(value: Any) -> Size:
    """The expression of an ``int``, ``torch.SymInt`` or expression."""
    if isinstance(value, torch.SymInt):
        return sympy.sympify(value.node.expr)
    return sympy.sympify(value)


def sizes(values: Iterable[Any]) -> tuple[Size, ...]:
    return tuple(size(v) for v in values)


def product(values: Iterable[Size]) -> Size:
    out: Size = sympy.Integer(1)
    for v in values:
        out = out * v
    return sympy.expand(out)


@lru_cache(maxsize=65536)
def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` if that is a polynomial with integer coefficients, else ``None``."""
    if b == 1:
        return a
    if a == b:
        return sympy.Integer(1)
    if a.is_Integer and b.is_Integer:
        q, r = divmod(int(a), int(b))
        return sympy.Integer(q) if r == 0 else None
    gens = sorted(a.free_symbols | b.free_symbols, key=str)
    try:
        quotient, remainder = sympy.div(sympy.expand(a), sympy.expand(b), *gens, domain="ZZ")
    except (sympy.PolynomialError, sympy.CoercionFailed, NotImplementedError):
        return None
    return sympy.expand(quotient) if remainder == 0 else None


def same(a: Size, b: Size) -> bool:
    return a == b or sympy.expand(a - b) == 0


def has_axis(value: Size) -> bool:
    return T in value.free_symbols


def degree(shape: Sequence[Size]) -> int:
    """How many dimensions grow with the streamed length."""
    return sum(has_axis(d) for d in shape)


def per_token(shape: Sequence[Size]) -> float:
    """Elements per (batch entry, token): the product of the constant dimensions."""
    out = 1.0
    for d in shape:
        if not d.free_symbols:
            out *= int(d)
        else:
            out *= max(
                1.0, float(d.subs(dict.fromkeys(d.free_symbols, 64))) / 64 ** len(d.free_symbols)
            )
    return out


@lru_cache(maxsize=65536)
def _compiled(expr: Size) -> tuple[Any, tuple[str, ...]]:
    names = tuple(sorted(str(s) for s in expr.free_symbols))
    return compile(
        sympy.pycode(expr) if not _has_torch_functions(expr) else str(expr), "<size>", "eval"
    ), names


def _has_torch_functions(expr: Size) -> bool:
    return any(type(f).__module__.startswith("torch.") for f in sympy.preorder_traversal(expr))


def evaluate(expr: Size, env: Mapping[str, int]) -> int:
    """The value of ``expr`` under ``env`` (symbol name -> int)."""
    if expr.is_Integer:
        return int(expr)
    code, names = _compiled(expr)
    scope = {n: env[n] for n in names}
    return int(eval(code, {"__builtins__": {}, "max": max, "min": min}, scope))


def evaluate_shape(shape: Sequence[Size], env: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(evaluate(d, env) for d in shape)
