"""What a function that bodies call does: declared once, beside the function.

Rewrites, backends and the memory profile read it here, so a new function is one declaration.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fxmem.axes.size_calls import FUNCTIONS

F = TypeVar("F", bound=Callable[..., Any])
Gradient = Literal["", "value", "product", "total"]


@dataclass(frozen=True, slots=True)
class BodyOp:
    """One function. Operands are told by their position.

    Attributes:
        fn: the function.
        writes: the operands that it writes into.
        aliases: the operands whose memory its result may share.
        pure: an operator in another form, which a compiler may take apart.
        fake: its result from fake operands, where it is not to run on them; None to run it.
        average: what allocates as it does, where that depends on data; None for itself.
        accumulates: the operator whose chunks it adds into its first operand; the others are that
            operator's tensors, and then its arguments at ``extra``.
        gradient: what it adds into its first operand: its second operand ("value"), the matrix
            product of the next two ("product"), or something of its own ("total").
    """

    fn: Callable[..., Any]
    writes: tuple[int, ...] = ()
    aliases: tuple[int, ...] = ()
    pure: bool = False
    fake: Callable[..., Any] | None = None
    average: Callable[..., Any] | None = None
    accumulates: str = ""
    extra: tuple[int, ...] = ()
    gradient: Gradient = ""


BODY_OPS: dict[Any, BodyOp] = {}
"""By function."""


def body_op(**facts: Any) -> Callable[[F], F]:
    """Declare the decorated function; see :class:`BodyOp`."""

    def declare(fn: F) -> F:
        BODY_OPS[fn] = BodyOp(fn, **facts)
        return fn

    return declare


def adds(
    gradient: Gradient, of: str = "", extra: tuple[int, ...] = (),
    average: Callable[..., Any] | None = None,
) -> Callable[[F], F]:  # fmt: skip
    """Declare a function that adds into its first operand and returns nothing."""
    return body_op(
        writes=(0,), fake=nothing, gradient=gradient, accumulates=of, extra=extra, average=average
    )


def nothing(*_: Any) -> None:
    """The fake of what returns nothing."""


NUMBERS = FUNCTIONS | {operator.add, operator.sub, operator.mul, max, min, float}
"""Functions of numbers: sizes, bounds and rows."""

body_op(aliases=(0,))(operator.getitem)
