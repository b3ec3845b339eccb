"""Lower: the chunk form of ops whose chunk is not the op itself.

A slice along the streamed axis moves rows between chunks; attention takes spans of keys;
attention's backward adds into the accumulators of dK and dV; the backward of the token loss
overwrites logits that nobody needs any more. Everything else is emitted as it stands.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxmem.axes.sizes import HI, LO, T
from fxmem.kernels import attention, token_nll
from fxmem.program import body_ops as runtime
from fxmem.rewriting.aliases import sources, views
from fxmem.rewriting.patterns import CAST, RESHAPES, behind, is_op
from fxmem.streaming.labels import Label, Use
from fxmem.streaming.loop_body import Body, Handler

_VIEWS = (*RESHAPES, "aten.detach.default", "aten.alias.default")
_OWN = (
    "aten.mm.default", "aten.addmm.default", "aten.add.Tensor", CAST, "aten.mul.Tensor",
    "aten.div.Tensor",
)  # fmt: skip
"""What makes logits, in a storage of their own."""


def _slice(body: Body, node: fx.Node) -> Any:
    use, cut = body.labels.uses[node][0], body.labels.of(node).cut
    if use.cut is None or cut is None or node.args[1:2] == ():
        return None
    dim = node.args[1] % len(body.joint.info[node].shape)
    if dim != use.cut.dim:
        return None
    return body.moved(use, cut)


def _slice_backward(body: Body, node: fx.Node) -> Any:
    use, cut = body.labels.uses[node][0], body.labels.of(node).cut
    if use.cut is None or cut is None:
        return None
    dim = node.args[2] % len(body.joint.info[node].shape)
    if dim != use.cut.dim:
        return None
    (start, count), (first, rows) = body.ints.rows(cut), body.ints.rows(use.cut)
    # a row r of the gradient is row r + shift of the result
    moved = body.call(operator.add, first, body.ints(use.cut.offset - cut.offset))
    before = body.call(runtime.clamp, body.call(operator.sub, moved, start), count)
    filled = body.call(operator.add, before, rows)
    return body.call(
        runtime.pad_rows, body.operand(use), dim, before, body.call(operator.sub, count, filled)
    )


def _spans(body: Body, node: fx.Node, query: Use, keys: Any, causal: Any) -> Any:
    mask = next((u for u in body.labels.uses[node] if u.mask), None)
    if mask is None:
        if causal:
            return body.call(attention.causal_spans, *_rows(body, query))
        return body.call(attention.full_spans, keys)
    if mask.operand in body.mask_of and node in body.labels.masked:
        return body.masks[body.mask_of[mask.operand]]
    return body.call(attention.explicit_spans, body.operand(mask))


def _rows(body: Body, query: Use) -> tuple[Any, Any]:
    """Bounds of the chunk's queries among all queries."""
    cut = query.cut
    assert cut is not None
    if cut.offset == 0 and cut.length == T:
        return body.ints(LO), body.ints(HI)
    start, count = body.ints.rows(cut)
    return start, body.call(operator.add, start, count)


def _attention(body: Body, node: fx.Node) -> Any:
    if not _streams(body, node):
        return None
    query = body.labels.uses[node][0]
    q, k, v = (body.operand(u) for u in body.labels.uses[node][:3])
    spans = _spans(body, node, query, k, node.args[4])
    return body.call(attention.forward, q, k, v, spans, node.args[5])


def _attention_backward(body: Body, node: fx.Node) -> Any:
    if not _streams(body, node):
        return None
    query = body.labels.uses[node][1]
    dout, q, k, v, out, lse = (body.operand(u) for u in body.labels.uses[node][:6])
    sums = {n.args[1]: n for n in node.users if n in body.sums}
    dk, dv = (
        body.input(body.names[sums[i]]) if i in sums else body.call(runtime.zeros_like, x)
        for i, x in ((1, k), (2, v))
    )
    spans = _spans(body, node, query, k, node.args[7])
    dq = body.call(attention.backward, dout, q, k, v, out, lse, dk, dv, spans, node.args[8])
    return (dq, None, None)


def _streams(body: Body, node: fx.Node) -> bool:
    """Chunks are of queries, which see other chunks' keys; a chunk of the batch is whole."""
    label = body.labels.label[node]
    if not isinstance(label, tuple) or not isinstance(label[0], Label):
        return False
    return label[0].cut is not None and label[0].cut.dim == 2


def _token_nll(body: Body, node: fx.Node) -> Any:
    if _in_place_pair(body, node) is None:
        return None
    logits, target = (body.operand(u) for u in body.labels.uses[node])
    return body.call(token_nll.forward_, logits, target, node.args[2])


def _token_nll_backward(body: Body, node: fx.Node) -> Any:
    uses = body.labels.uses[node]
    grad, logits, target, lse = (body.operand(u) for u in uses)
    source = next(iter(uses[3].operand.all_input_nodes), None)
    if source is not None and _in_place_pair(body, source) == node:
        return body.call(token_nll.backward_, grad, logits, target, lse, node.args[4])
    reuse = _dies_here(body, uses[1].operand, node)
    return body.call(
        token_nll.backward, grad, logits, target, lse, node.args[4], logits if reuse else None
    )


def _in_place_pair(body: Body, forward: fx.Node) -> fx.Node | None:
    """The backward of the token loss ``forward``, where both may overwrite the logits: the same
    body runs them, and nothing else in it reads the logits or the logsumexp.
    """
    logits = forward.args[0]
    if str(forward.target) != "fxmem.token_nll.default" or forward not in body.order:
        return None
    assert isinstance(logits, fx.Node)
    lse = [u for u in forward.users if u.args[1] == 1]
    readers = [u for n in lse for u in n.users if u in body.order]
    if len(readers) != 1 or any(n in body.kept for n in lse):
        return None
    (backward,) = readers
    alone = _readers(body, logits) == {forward, backward}
    made = logits
    while alone and is_op(made, *_VIEWS):
        (source,) = made.all_input_nodes[:1]
        alone, made = _readers(body, source) == {made}, source
    fits = (
        str(backward.target) == "fxmem.token_nll_backward.default"
        and backward.args[1] is logits
        and body.joint.info[logits].dtype.itemsize >= 4
    )
    return backward if fits and alone and _dies_here(body, logits, backward) else None


def _readers(body: Body, value: fx.Node) -> set[fx.Node]:
    return {u for u in value.users if u in body.order}


def _dies_here(body: Body, operand: fx.Node, node: fx.Node) -> bool:
    """The body made the storage of ``operand``, and nothing in it reads that after ``node``."""
    made = behind(operand, *_VIEWS)
    memory = {made, *views(made)}
    return (
        is_op(made, *_OWN)
        and sources(operand) <= body.order.keys()
        and memory.isdisjoint(body.kept)
        and all(body.order.get(u, -1) <= body.order[node] for n in memory for u in n.users)
    )


HANDLERS: dict[str, Handler] = {
    "aten.slice.Tensor": _slice,
    "aten.slice_backward.default": _slice_backward,
    "fxmem.attention.default": _attention,
    "fxmem.attention_backward.default": _attention_backward,
    "fxmem.token_nll.default": _token_nll,
    "fxmem.token_nll_backward.default": _token_nll_backward,
}
"""Op name -> function from a body and a node to the node's value in the body (None: emit the op
itself).
"""
