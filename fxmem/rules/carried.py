"""Rows for ops whose chunk needs a state of the chunk before it, or after it: running sums, shifts,
causal convolutions, recurrences. What a chunk runs is in :mod:`fxmem.kernels.carried`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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


@dataclass(frozen=True)
class Called:
    """A call of a function with a state, as an op knows it.

    Attributes:
        ins: axes of its tensors, a letter each; ``t`` is the sequence. ``out``, ``state``: of its
            results.
        call: ``call(tensors, state) -> (result, next state)``.
        out_type, state_type: dtypes of the results.
        autocast: what autocast lowers to in the call, or None.
        sizes: of letters that no tensor has.
    """

    ins: tuple[str, ...]
    out: str
    state: str
    call: Callable[[Sequence[Any], Any], tuple[Any, Any]]
    out_type: Callable[[], torch.dtype]
    state_type: Callable[[], torch.dtype]
    autocast: torch.dtype | None
    sizes: tuple[tuple[str, int], ...] = ()


CALLS: dict[str, Called] = {}
"""By the key that an op has; a key says all that a call depends on."""


def _letters(text: str) -> Dims:
    return tuple((x,) for x in text)


def _parts(called: Called) -> tuple[tuple[Dims, ...], Dims, Dims, frozenset[str]]:
    """Dims of the tensors, result and states, and what must be complete: all but b and t."""
    ins = tuple(map(_letters, called.ins))
    every = frozenset("".join((*called.ins, called.out, called.state)))
    return ins, _letters(called.out), (ONE, *_letters(called.state)), every - {"b", "t"}


def recurrence(call: Call) -> Signature:
    """Arguments tensors, key."""
    ins, out, state, whole = _parts(CALLS[call.args[1]])
    return Signature(ins, (out, state, state), whole, carried={"t": ASCENDING}, final=1)


def recurrence_backward(call: Call) -> Signature:
    """Arguments grad, that of the last state, tensors, states, key, wanted; outputs the wanted
    gradients.
    """
    ins, out, state, whole = _parts(CALLS[call.args[4]])
    grads = tuple(d for d, w in zip(ins, call.args[5], strict=True) if w)
    return Signature(
        (out, state, *ins, state), (*grads, state), whole, carried={"t": DESCENDING},
        states=frozenset((len(ins) + 2,)), initial=1,
    )  # fmt: skip


ROWS: dict[str, AxisRule] = {
    "fxmem.recurrence.default": AxisRule(recurrence),
    "fxmem.recurrence_backward.default": AxisRule(recurrence_backward),
    "fxmem.delay.default": AxisRule(delay, linear=0),
    "fxmem.running_sum.default": AxisRule(running(1), linear=0),
    "fxmem.running_logsumexp.default": AxisRule(running(1)),
    "fxmem.linear_recurrence.default": AxisRule(running(2)),
    "fxmem.causal_conv.default": AxisRule(causal_conv),
    "fxmem.causal_conv_backward.default": AxisRule(causal_conv_backward),
}
