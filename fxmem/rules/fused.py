"""Rows for fxmem's own canonical ops: attention, token losses, random numbers, experts."""

from __future__ import annotations

from fxmem.axes.signature import ONE, AxisRule, Call, Dims, Order, Signature, letters
from fxmem.axes.sizes import T, has_axis, same


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


def _order(call: Call, rows: int, mask: int, sums: tuple[int, ...] = ()) -> Order:
    """Of queries, operand ``rows``, before keys and values.

    Causality compares the positions of queries and of keys, and a chunk knows those of its tokens
    alone: other queries, and queries of fewer keys, must be complete.
    """
    queries, keys = (t.shape[2] for t in call.tensors[rows : rows + 2])
    tokens = not has_axis(queries) or (same(queries, T) and (keys - T).is_nonnegative)
    given = None if call.args[mask] is None else mask
    return Order(rows, (rows + 1, rows + 2), sums, given, "" if tokens else "q")


def attention(call: Call) -> Signature:
    """Arguments q, k, v, mask, causal, scale."""
    ins, order = (Q, K, V, *_mask_dims(call, 3)), _order(call, 0, 3)
    found = Signature(ins, (OUT, LSE), frozenset("kefhg"), order=order)
    return found.hiding(later=bool(call.args[4]))


def attention_backward(call: Call) -> Signature:
    """Arguments dout, q, k, v, out, lse, mask, causal, scale; outputs dq (cut), dk, dv (sums)."""
    ins, order = (OUT, Q, K, V, OUT, LSE, *_mask_dims(call, 6)), _order(call, 1, 6, (1, 2))
    found = Signature(ins, (Q, K, V), frozenset("kehg"), order=order)
    return found.hiding(later=bool(call.args[7]))


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
    "fxmem.expert_linear.default": AxisRule(expert_linear, linear=0, product=(0, 1)),
    "fxmem.expert_weight_grad.default": AxisRule(expert_weight_grad, linear=0),
    "fxmem.dropout.default": AxisRule(dropout, linear=0, place=4),
    "fxmem.uniform.default": AxisRule(uniform, sizes=1, place=3, cheap=True),
}
