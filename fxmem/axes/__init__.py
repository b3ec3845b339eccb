"""Axis signatures, and the sizes they are written in: what a row of the table is made of."""

from fxmem.axes.signature import (
    ONE,
    AxisRule,
    Call,
    Dims,
    Signature,
    TensorInfo,
    einsum,
    letters,
)

__all__ = ["ONE", "AxisRule", "Call", "Dims", "Signature", "TensorInfo", "einsum", "letters"]
