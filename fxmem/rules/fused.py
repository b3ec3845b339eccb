"""Rows for fxmem's own canonical ops: attention, token losses, random numbers, experts."""

from __future__ import annotations

from typing import Any

from fxmem.axes.signature import ONE, AxisRule, Call, Dims, Signature, letters
from fxmem.axes.sizes import T, has_axis, same

ATTENTION = {"fxmem.attention.default": (3, 4), "fxmem.attention_backward.default": (6, 7)}
"""Positions of (mask, causal) in the arguments of the canonical attention ops."""
QUERY = {"fxmem.attention.default": 0, "fxmem.attention_backward.default": 1}
"""Position of the queries, before keys and values."""
QUERY_AXIS = 2
"""Axis of the query tokens in q ``[B, H, Q, E]``."""


def _mask_dims(call: Call, position: int) -> tuple[Dims, ...]:
    mask = call.args[position]
    if mask is None:
        return ()
    full: Dims = (("b",), ("h",), ("q",), ("k",))
    return (
        tuple(ONE if s == 1 else d for s, d in zip(mask.shape, full[4 - mask.rank :], strict=True)),
    )


Q: Dims = (("b",), ("h",), ("q",), ("e",))
K: Dims = (("b",), ("g",), ("k",), ("e",))
V: Dims = (("b",), ("g",), ("k",), ("f",))
OUT: Dims = (("b",), ("h",), ("q",), ("f",))
LSE: Dims = (("b",), ("h",), ("q",))


def attention(call: Call) -> Signature:
    """Arguments q, k, v, mask, causal, scale. A causal query chunk reads keys up to its own last
    row.
    """
    prefix = frozenset((1, 2)) if call.args[4] else frozenset[int]()
    whole = frozenset("kefhg") | _placed(call, 0, call.args[4])
    return Signature((Q, K, V, *_mask_dims(call, 3)), (OUT, LSE), whole, prefix=prefix)


def _placed(call: Call, at: int, causal: Any) -> frozenset[str]:
    """Causality compares the positions of queries (operand ``at``) and of keys, and a chunk knows
    those of its tokens alone: other queries, and queries of fewer keys, must be complete.
    """
    queries, keys = (t.shape[2] for t in call.tensors[at : at + 2])
    tokens = not has_axis(queries) or (same(queries, T) and (keys - T).is_nonnegative)
    return frozenset("q") if causal and not tokens else frozenset()


def attention_backward(call: Call) -> Signature:
    """Arguments dout, q, k, v, out, lse, mask, causal, scale; outputs dq (cut), dk, dv (sums)."""
    causal = bool(call.args[7])
    return Signature(
        (OUT, Q, K, V, OUT, LSE, *_mask_dims(call, 6)),
        (Q, K, V),
        frozenset("kehg") | _placed(call, 1, call.args[7]),
        prefix=frozenset((2, 3)) if causal else frozenset[int](),
        suffix=frozenset((1, 2)) if causal else frozenset[int](),
    )


def token_nll(call: Call) -> Signature:
    """Arguments logits [N, V], target [N], ignore_index; outputs nll [N] and logsumexp [N]."""
    return Signature(((("n",), ("v",)), (("n",),)), ((("n",),), (("n",),)), frozenset("v"))


def token_nll_backward(call: Call) -> Signature:
    """Arguments grad [N], logits [N, V], target [N], logsumexp [N], ignore_index."""
    rows: Dims = (("n",),)
    logits: Dims = (("n",), ("v",))
    return Signature((rows, logits, rows, rows), (logits,), frozenset("v"))


def expert_linear(call: Call) -> Signature:
    """Arguments x [S, I], weight [E, O, I], index [S]; output [S, O]."""
    weight: Dims = (("e",), ("o",), ("i",))
    rows: Dims = (("s",), ("i",))
    return Signature((rows, weight, (("s",),)), ((("s",), ("o",)),), frozenset("e"))


def expert_weight_grad(call: Call) -> Signature:
    """Arguments grad [S, O], x [S, I], index [S]; output [E, O, I]: a sum over rows."""
    ins: tuple[Dims, ...] = ((("s",), ("o",)), (("s",), ("i",)), (("s",),))
    return Signature(ins, ((("e",), ("o",), ("i",)),), frozenset("e"))


def dropout(call: Call) -> Signature:
    """Arguments x, seed, p, site, place: the mask is a function of (seed, site, position)."""
    dims = letters("d", call.out.rank)
    return Signature((dims, ()), (dims,))


def uniform(call: Call) -> Signature:
    """Arguments seed, size, site, place, dtype, device."""
    return Signature(((),), (letters("d", call.out.rank),))


ROWS: dict[str, AxisRule] = {
    "fxmem.attention.default": AxisRule(attention),
    "fxmem.attention_backward.default": AxisRule(attention_backward, linear=0),
    "fxmem.token_nll.default": AxisRule(token_nll),
    "fxmem.token_nll_backward.default": AxisRule(token_nll_backward, linear=0),
    "fxmem.expert_linear.default": AxisRule(expert_linear, linear=0),
    "fxmem.expert_weight_grad.default": AxisRule(expert_weight_grad, linear=0),
    "fxmem.dropout.default": AxisRule(dropout, linear=0, place=4),
    "fxmem.uniform.default": AxisRule(uniform, sizes=1, place=3, cheap=True),
}
