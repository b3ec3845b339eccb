"""Rows for products with quantised weights: each token's row by itself, the packed weight whole."""

from __future__ import annotations

from fxmem.axes.signature import AxisRule, Call, Signature, letters


def packed_product(call: Call) -> Signature:
    """``x [..., K]``, a packed weight and what unpacks it (scales, a bias) -> ``[..., N]``."""
    x, *others = call.tensors
    rows = letters("b", x.rank - 1)
    packed = tuple(letters(f"w{i}_", t.rank) for i, t in enumerate(others))
    whole = {"k", "n"} | {axis for dims in packed for dim in dims for axis in dim}
    return Signature(((*rows, ("k",)), *packed), ((*rows, ("n",)),), frozenset(whole))


# Of libraries that may not be there: the field tests have their oracle.
ROWS = {"bitsandbytes.gemm_4bit.default": AxisRule(packed_product)}
