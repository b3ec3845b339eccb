"""Rows for ops whose chunk needs a state of the chunk before it, or after it: running sums, shifts,
causal convolutions, recurrences. What a chunk runs is in :mod:`fxmem.kernels.carried`.
"""

from __future__ import annotations

from fxmem.axes.signature import ONE, AxisRule, Call, Dims, Rule, Signature, letters

ASCENDING, DESCENDING = 1, -1


def _along(call: Call, position: int, direction: int) -> Signature:
    """Operands and result alike; a state has some rows of axis ``position``."""
    rank = call.tensors[0].rank
    dims, at = letters("d", rank), call.args[position] % rank
    state = call.outs[1]
    halo = ONE if state is None or state.shape[1 + at] == 1 else ("halo",)
    kept: Dims = (ONE, *(halo if i == at else d for i, d in enumerate(dims)))
    return Signature(
        (dims,) * len(call.tensors), (dims, kept), frozenset(halo),
        carried={f"d{at}": direction},
    )  # fmt: skip


def delay(call: Call) -> Signature:
    """Arguments x, dim, rows; a negative number of rows is read from later chunks."""
    return _along(call, 1, ASCENDING if call.args[2] > 0 else DESCENDING)


def running(position: int) -> Rule:
    """The axis is argument ``position``, and whether it runs from the end stands behind it."""

    def rule(call: Call) -> Signature:
        return _along(call, position, DESCENDING if call.args[position + 1] else ASCENDING)

    return rule


X: Dims = (("n",), ("c",), ("l",))
Y: Dims = (("n",), ("o",), ("l",))
W: Dims = (("o",), ("c",), ("k",))
ROWS_BEFORE: Dims = (ONE, ("n",), ("c",), ("halo",))


def _kernel(call: Call, at: int, bias: bool) -> tuple[Dims, frozenset[str]]:
    """Dims of the weight, operand ``at``, and what must be complete; the last argument counts
    groups."""
    whole = frozenset(("k", "halo", *("c" if bias else "")))
    if call.args[-1] == 1:
        return W, whole
    inside = ONE if call.tensors[at].shape[1] == 1 else ("i",)
    return (("o",), inside, ("k",)), whole | frozenset("oci")


def causal_conv(call: Call) -> Signature:
    """Arguments x, weight, bias, dilation, groups."""
    bias = call.args[2] is not None
    weight, whole = _kernel(call, 1, bias)
    ins: tuple[Dims, ...] = (X, weight, (("o",),)) if bias else (X, weight)
    return Signature(ins, (Y, ROWS_BEFORE), whole, carried={"l": ASCENDING})


def causal_conv_backward(call: Call) -> Signature:
    """Arguments grad, x, weight, rows before, dilation, groups; outputs dx, dweight, dbias."""
    weight, whole = _kernel(call, 2, True)
    return Signature(
        (Y, X, weight, ROWS_BEFORE), (X, weight, (("o",),), ROWS_BEFORE), whole,
        carried={"l": DESCENDING}, states=frozenset((3,)),
    )  # fmt: skip


ROWS: dict[str, AxisRule] = {
    "fxmem.delay.default": AxisRule(delay, linear=0),
    "fxmem.running_sum.default": AxisRule(running(1), linear=0),
    "fxmem.running_logsumexp.default": AxisRule(running(1)),
    "fxmem.linear_recurrence.default": AxisRule(running(2)),
    "fxmem.causal_conv.default": AxisRule(causal_conv),
    "fxmem.causal_conv_backward.default": AxisRule(causal_conv_backward),
}
