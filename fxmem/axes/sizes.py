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

from fxmem.axes.size_calls import fold

T = sympy.Symbol("T", integer=True, positive=True)
LO = sympy.Symbol("lo", integer=True, nonnegative=True)
HI = sympy.Symbol("hi", integer=True, positive=True)
AT = sympy.Symbol("at", integer=True, nonnegative=True)
"""First row of a chunk among those of this rank, where ranks have parts of the axis."""
STEP = sympy.Symbol("step", integer=True, positive=True)
"""Rows of a full chunk."""
CHUNKS = sympy.Symbol("chunks", integer=True, positive=True)
"""How many chunks a loop has."""

Size: TypeAlias = sympy.Expr
ZERO: Size = sympy.Integer(0)
UNIT: Size = sympy.Integer(1)


def size(value: Any) -> Size:
    """The expression of an ``int``, ``torch.SymInt`` or expression."""
    expr = sympy.sympify(value.node.expr if isinstance(value, torch.SymInt) else value)
    return expr if expr.is_Atom else _divided(expr)


@lru_cache(maxsize=65536)
def _divided(expr: Size) -> Size:
    """``expr`` with quotients that come out even: the size of a ``-1`` in a reshape is one."""
    return expr.replace(
        lambda e: type(e).__name__ == "FloorDiv",
        lambda e: e if (quotient := divide(*e.args)) is None else quotient,
    )


def sizes(values: Iterable[Any]) -> tuple[Size, ...]:
    return tuple(size(v) for v in values)


def product(values: Iterable[Size]) -> Size:
    out: Size = sympy.Integer(1)
    for v in values:
        out = out * v
    return sympy.expand(out)


@lru_cache(maxsize=65536)
def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` if that is a polynomial with integer coefficients, else ``None``.

    Whatever is no polynomial (``T // 2``, ``min(3, T)``) counts as a symbol of its own.
    """
    if b == 1:
        return a
    if b == 0:
        return None
    if a == b:
        return sympy.Integer(1)
    if a.is_Integer and b.is_Integer:
        q, r = divmod(int(a), int(b))
        return sympy.Integer(q) if r == 0 else None
    atoms: dict[Size, sympy.Symbol] = {}
    top, bottom = (_polynomial(sympy.expand(x), atoms) for x in (a, b))
    gens = sorted(top.free_symbols | bottom.free_symbols, key=str)
    if top.has(sympy.Float) or bottom.has(sympy.Float) or not gens:
        return None
    try:
        quotient, remainder = sympy.div(top, bottom, *gens, domain="ZZ")
    except (sympy.PolynomialError, sympy.CoercionFailed, NotImplementedError):
        return None
    if remainder != 0:
        return None
    return sympy.expand(quotient.xreplace({s: x for x, s in atoms.items()}))


def _polynomial(expr: Size, atoms: dict[Size, sympy.Symbol]) -> Size:
    """``expr`` with a symbol for every part that is no polynomial, kept in ``atoms``."""
    if expr.is_Add or expr.is_Mul:
        return expr.func(*(_polynomial(x, atoms) for x in expr.args))
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        return _polynomial(expr.base, atoms) ** expr.exp
    if expr.is_Symbol or expr.is_Number:
        return expr
    return atoms.setdefault(expr, sympy.Dummy(f"part{len(atoms)}", integer=True))


def linear(expr: Size) -> tuple[Size, Size] | None:
    """``(a, b)`` such that ``expr = a T + b``, where neither has ``T``; None if there are none."""
    expr = sympy.expand(expr)
    a, b = expr.coeff(T, 1), expr.coeff(T, 0)
    if a == 0 or has_axis(a) or has_axis(b) or not same(a * T + b, expr):
        return None
    return a, b


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
            names = [str(s) for s in d.free_symbols]
            out *= max(1.0, number(d, dict.fromkeys(names, 64)) / 64 ** len(names))
    return out


def byte_count(shape: Sequence[Size], dtype: torch.dtype) -> Size:
    """Bytes of a dense tensor."""
    return product((*shape, sympy.Integer(dtype.itemsize)))


@lru_cache(maxsize=65536)
def _names(expr: Size) -> tuple[tuple[sympy.Symbol, str], ...]:
    return tuple((s, str(s)) for s in expr.free_symbols)


def number(expr: Size, env: Mapping[str, int]) -> int | float:
    """The value of ``expr`` under ``env`` (symbol name -> int)."""
    if expr.is_Integer:
        return int(expr)
    value: int | float = fold(expr, {s: env[n] for s, n in _names(expr)})
    return value


def evaluate(expr: Size, env: Mapping[str, int]) -> int:
    """The value of a size, an ``int``, under ``env`` (symbol name -> int)."""
    return int(number(expr, env))


def evaluate_shape(shape: Sequence[Size], env: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(evaluate(d, env) for d in shape)


def with_chunks(sizes: Mapping[str, int], rows: int) -> dict[str, int]:
    """The sizes of a call, and what its loops over chunks of so many rows know besides."""
    length = sizes.get("T", 1)
    return {**sizes, str(STEP): max(1, rows), str(CHUNKS): -(-length // max(1, rows))}
