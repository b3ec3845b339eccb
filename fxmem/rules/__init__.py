"""The axis-signature table: one row per op, families first.

Pointwise ops come from ``torch.Tag.pointwise`` and need no row. ``lookup`` is the only reader;
users add a row for a custom op with :func:`register`. String keys resolve on first use, so an op
that is created late cannot break the import.
"""

from __future__ import annotations

from typing import Any

import torch

from fxmem._compat.graph import OpOverload, is_random
from fxmem.axes.signature import AxisRule, Call, Einsum
from fxmem.errors import PlanError
from fxmem.rules import arithmetic, carried, fused, indexing, movement, quantized, windows

TABLE: dict[str, AxisRule] = {
    **movement.ROWS, **arithmetic.ROWS, **indexing.ROWS, **windows.ROWS, **fused.ROWS,
    **carried.ROWS,
}  # fmt: skip

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
        "aten.rrelu_with_noise_backward.default",
        "aten.softshrink_backward.default",
        "aten.hardshrink_backward.default",
        "aten.hardswish.default",
        "aten.hardswish_backward.default",
        "aten.hardsigmoid_backward.default",
        "aten.mish_backward.default",
        "aten._prelu_kernel.default",
        "aten._prelu_kernel_backward.default",
        "aten.rsub.Tensor",
        "aten.floor_divide.default",
        "aten.floor_divide.Scalar",
        "aten._neg_view.default",
        "aten._conj.default",
        "aten.complex.default",
        "aten.polar.default",
        "aten.fill.Scalar",
        "aten.copy.default",
        "aten.masked_fill.Scalar",
        "aten.masked_fill.Tensor",
        "aten.where.self",
        "aten.where.ScalarOther",
        "aten.where.ScalarSelf",
        "aten.where.Scalar",
    }
)

# Ops that torch's own decompositions write out in ops that have rows. Their own arguments say how
# many rows there are, or how the result is reduced, which no row can follow.
WRITTEN_OUT = (
    "aten.native_group_norm.default",
    "aten.native_group_norm_backward.default",
    "aten.mse_loss.default",
    "aten.mse_loss_backward.default",
    "aten.smooth_l1_loss.default",
    "aten.smooth_l1_loss_backward.default",
    "aten.huber_loss.default",
    "aten.huber_loss_backward.default",
    "aten.binary_cross_entropy.default",
    "aten.binary_cross_entropy_backward.default",
    "aten.soft_margin_loss.default",
    "aten.soft_margin_loss_backward.default",
    "aten.pixel_shuffle.default",
    "aten.pixel_unshuffle.default",
    "aten.glu.default",
    "aten.glu_backward.default",
    "aten.std.correction",
    "aten.std_mean.correction",
    "aten.triu.default",
    "aten.tril.default",
    "aten.addmv.default",
    "aten.addr.default",
    "aten.all.dims",
    "aten.aminmax.default",
    "aten.dist.default",
    "aten.linalg_cross.default",
    "aten.nansum.default",
    "aten._euclidean_dist.default",
)


def lookup(target: Any) -> AxisRule | None:
    """The row of an op, or ``None``: then the op is a barrier."""
    row = TABLE.get(str(target)) or quantized.ROWS.get(str(target))
    if row is not None:
        return row
    if str(target) in POINTWISE_UNTAGGED or _is_pointwise(target):
        return arithmetic.POINTWISE
    return None


def carries_state(target: Any) -> bool:
    """Chunks of the op may need a state of the chunk before: its last result is that state."""
    row = TABLE.get(str(target))
    return row is not None and (row.step is not None or str(target) in carried.ROWS)


def no_fit(row: AxisRule | None, call: Call) -> str:
    """Why a call has no signature by its row."""
    if row is None:
        return "it has no row"
    misfit = row.rule.misfit(call) if isinstance(row.rule, Einsum) else ""
    return misfit or "its row does not cover this call"


def _is_pointwise(target: Any) -> bool:
    if not isinstance(target, OpOverload) or is_random(target) or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags


def register(op: Any, row: AxisRule, *, replace: bool = False) -> None:
    """Add a row for a custom op (a ``torch.ops`` overload or its name, ``"ns.op.overload"``).

    Raises:
        PlanError: the op has a row already and ``replace`` is false; or the row, by
            :func:`fxmem.axes.einsum`, has more operands than the op takes tensors, fewer than it
            needs, or another number of results.
    """
    key = str(op)
    if isinstance(op, OpOverload) and isinstance(row.rule, Einsum):
        _check(op, row.rule)
    if key in TABLE and not replace:
        raise PlanError(
            f"op {key} has a row in the axis table already; pass replace=True to change it"
        )
    TABLE[key] = row
    _edits.append(key)


def _check(op: OpOverload, rule: Einsum) -> None:
    """The row fits the schema, where that says how many tensors there are."""
    kinds = [str(a.type) for a in op._schema.arguments]
    if any("Tensor[]" in k or "List[Tensor" in k or "List[Optional" in k for k in kinds):
        return
    needed, most = kinds.count("Tensor"), sum("Tensor" in k for k in kinds)
    if not needed <= len(rule.ins) <= most:
        takes = str(most) if needed == most else f"{needed} to {most}"
        raise PlanError(
            f"the row of {op} has {len(rule.ins)} operands, the op takes {takes} tensors",
            advice=f"its schema is {op._schema}",
        )
    results = len(op._schema.returns)
    if len(rule.outs) != results:
        raise PlanError(
            f"the row of {op} has {len(rule.outs)} results, the op {results}",
            advice=f"its schema is {op._schema}",
        )


_edits: list[str] = []


def revision() -> int:
    """Number of registrations so far: what was compiled under an older table is not reused."""
    return len(_edits)
