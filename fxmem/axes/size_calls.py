"""What a size is made of: one reading of sympy expressions for everything that computes sizes.

:func:`fold` walks an expression with the caller's meaning of a call: numbers when a program runs,
nodes of a graph when a body is written, symbolic integers when one is traced. All of PyTorch's size
functions are known; one that is not is an error that names it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, MutableMapping
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch

from fxmem._compat import graph as _compat
from fxmem.errors import CaptureError

Operation: TypeAlias = tuple[Callable[..., Any], tuple[sympy.Basic, ...]]


def modular(a: Any, b: Any, c: Any) -> Any:
    """``a // b % c``."""
    return a // b % c


def truncated(x: Any) -> Any:
    """``x`` without its fraction, as a float."""
    return torch.sym_float(math.trunc(x))


def same_value(x: Any) -> Any:
    """``x``."""
    return x


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "ModularIndexing": modular,
    "Mod": operator.mod, "PythonMod": operator.mod, "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv, "Pow": operator.pow, "PowByNatural": operator.pow,
    "FloatPow": operator.pow, "LShift": operator.lshift, "RShift": operator.rshift,
    "Max": torch.sym_max, "Min": torch.sym_min, "Where": torch.sym_ite, "Identity": same_value,
    "ToFloat": torch.sym_float, "CeilToInt": math.ceil, "FloorToInt": math.floor,
    "TruncToInt": math.trunc, "TruncToFloat": truncated, "RoundToInt": round,
    "RoundDecimal": round, "Abs": abs, "floor": math.floor, "ceiling": math.ceil,
    "Equality": operator.eq, "Unequality": operator.ne, "StrictLessThan": operator.lt,
    "LessThan": operator.le, "StrictGreaterThan": operator.gt, "GreaterThan": operator.ge,
    "And": operator.and_, "Or": operator.or_, "Not": torch.sym_not,
    **{f"BitwiseFn_bitwise_{n}": getattr(operator, f"{n}_") for n in ("and", "or")},
    "BitwiseFn_bitwise_xor": operator.xor,
    **{f"OpaqueUnaryFn_{n}": f for n, f in _compat.unary_functions().items()},
}  # fmt: skip
"""By class name; ``OpaqueUnaryFn_sqrt`` and the like are functions of real numbers."""
FUNCTIONS = frozenset((*_FUNCTIONS.values(), operator.add, operator.mul))
"""Every function that a size may be computed by."""
_PAIRWISE = ("Max", "Min", "And", "Or")


@lru_cache(maxsize=65536)
def operation(expr: sympy.Basic) -> Operation:
    """The outermost call of an expression that is no symbol and no number.

    Raises:
        CaptureError: the expression has a function that is not known.
    """
    if isinstance(expr, sympy.Mul):
        factor, rest = expr.as_coeff_Mul()
        if factor.is_Rational and not factor.is_Integer:
            # divided once and last, so that a whole result is exact
            return operator.truediv, (rest * factor.p, sympy.Integer(factor.q))
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        first, last = expr.as_two_terms()
        return operator.add if expr.is_Add else operator.mul, (first, last)
    if isinstance(expr, sympy.Piecewise):
        (value, condition), *others = expr.args
        return torch.sym_ite, (condition, value, _first(others))
    name, args = type(expr).__name__, expr.args
    if name not in _FUNCTIONS:
        raise CaptureError(
            f"a size is computed with `{name}`, as `{expr}`, which fxmem does not know",
            op=name, advice="compute it with + - * // % min max, or pass it in as an argument",
        )  # fmt: skip
    if name in _PAIRWISE and len(args) > 2:
        args = (args[0], expr.func(*args[1:]))
    return _FUNCTIONS[name], args


def _first(pieces: list[tuple[sympy.Expr, sympy.Basic]]) -> sympy.Expr:
    """The value of what is left of a choice; its last condition is always true."""
    return pieces[0][0] if len(pieces) == 1 else sympy.Piecewise(*pieces)


def constant(expr: sympy.Basic) -> bool | int | float | None:
    """The Python number of an expression without operands, None for a symbol or a call."""
    if isinstance(expr, sympy.logic.boolalg.BooleanAtom):
        return bool(expr)
    if not isinstance(expr, sympy.Number) and not (not expr.args and expr.is_number):
        return None
    return int(expr) if isinstance(expr, sympy.Integer) else float(expr)


def fold(
    expr: sympy.Basic, known: MutableMapping[Any, Any],
    call: Callable[..., Any] = lambda function, args: function(*args),
) -> Any:  # fmt: skip
    """The value of ``expr``; ``known`` has its symbols, and receives what is computed."""
    if expr in known:
        return known[expr]
    number = constant(expr)
    if number is not None:
        return number
    function, args = operation(expr)
    known[expr] = call(function, tuple(fold(a, known, call) for a in args))
    return known[expr]
