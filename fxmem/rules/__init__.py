"""The axis-signature table: one row per op, families first.

Pointwise ops come from ``torch.Tag.pointwise`` and need no row. ``lookup`` is the only reader;
users add a row for a custom op with :func:`register`. String keys resolve on first use, so an op
that is created late cannot break the import.
"""

from __future__ import annotations

from typing import Any

import torch

from fxmem._compat import OpOverload
from fxmem.axes import AxisRule
from fxmem.errors import PlanError
from fxmem.rules import arithmetic, fused, indexing, movement

TABLE: dict[str, AxisRule] = {**movement.ROWS, **arithmetic.ROWS, **indexing.ROWS, **fused.ROWS}

# Ops without the tag that act element by element all the same.
POINTWISE_UNTAGGED = frozenset(
    {
        "aten.threshold_backward.default",
        "aten.gelu_backward.default",
        "aten.silu_backward.default",
        "aten.sigmoid_backward.default",
        "aten.tanh_backward.default",
        "aten.hardtanh_backward.default",
        "aten.elu_backward.default",
        "aten.softplus_backward.default",
        "aten.leaky_relu_backward.default",
        "aten.masked_fill.Scalar",
        "aten.masked_fill.Tensor",
        "aten.where.self",
        "aten.where.ScalarOther",
        "aten.where.ScalarSelf",
        "aten.where.Scalar",
    }
)


def lookup(target: Any) -> AxisRule | None:
    """The row of an op, or ``None``: then the op is a barrier."""
    row = TABLE.get(str(target))
    if row is not None:
        return row
    if str(target) in POINTWISE_UNTAGGED or _is_pointwise(target):
        return arithmetic.POINTWISE
    return None


def _is_pointwise(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags


def register(op: Any, row: AxisRule, *, replace: bool = False) -> None:
    """Add a row for a custom op (a ``torch.ops`` overload or its name, ``"ns.op.overload"``).

    Raises :class:`~fxmem.errors.PlanError` if the op has a row already and ``replace`` is false.
    """
    key = str(op)
    if key in TABLE and not replace:
        raise PlanError(
            f"op {key} has a row in the axis table already; pass replace=True to change it"
        )
    TABLE[key] = row
    _edits.append(key)


_edits: list[str] = []


def revision() -> int:
    """Number of registrations so far: what was compiled under an older table is not reused."""
    return len(_edits)
