"""Rows for fxmem's own canonical ops: attention, token losses, dropout, experts."""

from __future__ import annotations

from fxmem.axes import ONE, AxisRule, Call, Dims, Signature, letters


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
    return Signature((Q, K, V, *_mask_dims(call, 3)), (OUT, LSE), frozenset("kefhg"), prefix=prefix)


def attention_backward(call: Call) -> Signature:
    """Arguments dout, q, k, v, out, lse, mask, causal, scale; outputs dq (cut), dk, dv (sums)."""
    causal = bool(call.args[7])
    return Signature(
        (OUT, Q, K, V, OUT, LSE, *_mask_dims(call, 6)),
        (Q, K, V),
        frozenset("kehg"),
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
    """Arguments x, seed, p, site: the mask is a function of (seed, site, element position)."""
    dims = letters("d", call.out.rank)
    return Signature((dims, ()), (dims,))


ROWS: dict[str, AxisRule] = {
    "fxmem.attention.default": AxisRule(attention),
    "fxmem.attention_backward.default": AxisRule(attention_backward, linear=0),
    "fxmem.token_nll.default": AxisRule(token_nll),
    "fxmem.token_nll_backward.default": AxisRule(token_nll_backward, linear=0),
    "fxmem.expert_linear.default": AxisRule(expert_linear, linear=0),
    "fxmem.expert_weight_grad.default": AxisRule(expert_weight_grad, linear=0),
    "fxmem.dropout.default": AxisRule(dropout, linear=0),
}
