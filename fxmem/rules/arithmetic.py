"""Rows for arithmetic: pointwise ops (by tag), reductions, matrix products, softmax and
normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxmem.axes.signature import (
    ONE,
    AxisRule,
    Call,
    Dims,
    Rule,
    Signature,
    TensorInfo,
    broadcast,
    einsum,
    letters,
)
from fxmem.axes.sizes import same
from fxmem.rules.movement import along


def pointwise(call: Call) -> Signature:
    """Every output element depends on the same element of each operand, which may broadcast."""
    out = call.out
    return Signature(broadcast(call, call.tensors, out), (letters("d", out.rank),) * len(call.outs))


POINTWISE = AxisRule(pointwise, cheap=True)


def log_sigmoid(call: Call) -> Signature | None:
    """Pointwise with a buffer from forward to backward, which is empty on some devices."""
    shape = call.out.shape
    tensors = (*call.tensors, *(o for o in call.outs if o is not None))
    return pointwise(call) if all(t.shape == shape for t in tensors) else None


def _reduced(call: Call, index: int, default: int | None = None) -> set[int]:
    rank = call.tensors[0].rank
    given = call.arg(index, default)
    if given is None or (isinstance(given, Sequence) and not given):
        return set(range(rank))
    return (
        {d % rank for d in (given if isinstance(given, Sequence) else (given,))} if rank else set()
    )


def reduction(index: int = 1, keepdim: int = 2, *, sums: bool, default: int | None = None) -> Rule:
    """Axes of argument ``index`` disappear, all where it and the ``default`` are None. With
    ``sums`` chunks of such an axis add up, else it is whole.
    """

    def rule(call: Call) -> Signature:
        t, gone = call.tensors[0], _reduced(call, index, default)
        dims = letters("d", t.rank)
        kept = bool(call.arg(keepdim, call.kwargs.get("keepdim", False)))
        out = tuple(ONE if i in gone else d for i, d in enumerate(dims) if kept or i not in gone)
        whole = frozenset() if sums else frozenset(f"d{i}" for i in gone)
        return Signature((dims,), (out,) * len(call.outs), whole)

    return rule


def softmax(position: int, operands: int) -> Rule:
    def rule(call: Call) -> Signature:
        rank = call.tensors[0].rank
        dims = letters("d", rank)
        whole = frozenset((f"d{call.args[position] % rank}",)) if rank else frozenset[str]()
        return Signature((dims,) * operands, (dims,), whole)

    return rule


def addmm(call: Call) -> Signature:
    """``bias + a @ b``: cut along the contraction, the bias would be added once per chunk."""
    bias, a, b = call.tensors
    full: Dims = (("m",), ("n",))
    dims = tuple(
        ONE if size == 1 and not same(size, out) else d
        for size, out, d in zip(
            bias.shape, call.out.shape[-bias.rank or 2 :], full[-bias.rank or 2 :], strict=True
        )
    )
    return Signature((dims, (("m",), ("k",)), (("k",), ("n",))), (full,), frozenset("k"))


def baddbmm(call: Call) -> Signature:
    full = letters("d", 3)
    dims = broadcast(call, call.tensors[:1], call.out)[0]
    a, b = (("d0",), ("d1",), ("k",)), (("d0",), ("k",), ("d2",))
    return Signature((dims, a, b), (full,), frozenset("k"))


def layer_norm(call: Call) -> Signature:
    x, norm = call.tensors[0], len(call.args[1])
    dims = letters("d", x.rank)
    tail = dims[x.rank - norm :]
    stats = tuple(ONE if i >= x.rank - norm else d for i, d in enumerate(dims))
    weights = (tail,) * (len(call.tensors) - 1)
    outs = (dims, stats, stats)[: len(call.outs)]
    return Signature((dims, *weights), outs, frozenset(x for (x,) in tail))


def layer_norm_backward(call: Call) -> Signature:
    """dx is cut with its rows; the gradients of weight and bias are sums over rows."""
    x, norm = call.tensors[1], len(call.args[2])
    dims = letters("d", x.rank)
    tail = dims[x.rank - norm :]
    stats = tuple(ONE if i >= x.rank - norm else d for i, d in enumerate(dims))
    weights = (tail,) * (len(call.tensors) - 4)
    outs = tuple(
        None if o is None else d for o, d in zip(call.outs, (dims, tail, tail), strict=True)
    )
    return Signature((dims, dims, stats, stats, *weights), outs, frozenset(x for (x,) in tail))


def rms_norm_backward(call: Call) -> Signature:
    x, norm = call.tensors[1], len(call.args[2])
    dims = letters("d", x.rank)
    tail = dims[x.rank - norm :]
    stats = tuple(ONE if i >= x.rank - norm else d for i, d in enumerate(dims))
    outs = tuple(None if o is None else d for o, d in zip(call.outs, (dims, tail), strict=True))
    weights = (tail,) * (len(call.tensors) - 3)
    return Signature((dims, dims, stats, *weights), outs, frozenset(x for (x,) in tail))


def batch_norm(training: int | None = None) -> Rule:
    """``x [N, C, *L]`` by numbers per channel; argument ``training`` says whether they are those of
    the call, which has no row: it writes them down.
    """

    def rule(call: Call) -> Signature | None:
        x = call.tensors[0]
        if x.rank < 2 or (training is not None and call.args[training]):
            return None
        return _per_channel(call, ("n", "c", *(f"l{i}" for i in range(x.rank - 2))))

    return rule


def batch_norm_backward(call: Call) -> Signature | None:
    """Arguments grad, x, weight, means, variances, saved ones, training, eps, wanted."""
    x = call.tensors[1]
    if x.rank < 2 or call.args[7]:
        return None
    return _per_channel(call, ("n", "c", *(f"l{i}" for i in range(x.rank - 2))))


def _per_channel(call: Call, axes: tuple[str, ...]) -> Signature:
    """Dims of values, and of numbers per channel, which may be absent: an axis of no element."""

    def dims(t: TensorInfo | None) -> Dims | None:
        if t is None:
            return None
        if t.rank > 1:
            return tuple((a,) for a in axes)
        return ((("none",) if t.shape[0] == 0 else ("c",)),)

    ins = tuple(d for t in call.tensors if (d := dims(t)) is not None)
    outs = tuple(map(dims, call.outs))
    absent = any(("none",) in d for d in (*ins, *outs) if d)
    return Signature(ins, outs, frozenset(("none",) if absent else ()))


def distances(call: Call) -> Signature:
    """Of every row of the first to every row of the second."""
    lead = letters("d", call.out.rank - 2)
    ins = ((*lead, ("p",), ("m",)), (*lead, ("r",), ("m",)))
    return Signature(ins, ((*lead, ("p",), ("r",)),), frozenset("m"))


def distances_backward(call: Call) -> Signature:
    """Gradient of the first: a sum over the rows of the second."""
    lead = letters("d", call.out.rank - 2)
    first, second = (*lead, ("p",), ("m",)), (*lead, ("r",), ("m",))
    each = (*lead, ("p",), ("r",))
    return Signature((each, first, second, each), (first,))


_sum = AxisRule(reduction(sums=True), linear=0)
_whole = AxisRule(reduction(sums=False))
_all_whole = AxisRule(reduction(index=9, keepdim=9, sums=False))
_order = AxisRule(reduction(sums=False, default=-1))
_softmax_backward = AxisRule(softmax(2, 2), linear=0)

ROWS: dict[str, AxisRule] = {
    "aten.log_sigmoid_forward.default": AxisRule(log_sigmoid),
    "aten.log_sigmoid_backward.default": AxisRule(log_sigmoid, linear=0),
    "aten.mm.default": AxisRule(einsum("m k, k n -> m n"), linear=0, product=(0, 1)),
    "aten.bmm.default": AxisRule(einsum("b m k, b k n -> b m n"), linear=0, product=(0, 1)),
    "aten.addmm.default": AxisRule(addmm, product=(1, 2)),
    "aten.baddbmm.default": AxisRule(baddbmm, product=(1, 2)),
    "aten.mv.default": AxisRule(einsum("m k, k -> m"), linear=0, product=(0, 1)),
    "aten.dot.default": AxisRule(einsum("k, k ->"), linear=0, product=(0, 1)),
    "aten.sum.dim_IntList": _sum,
    "aten.sum.default": AxisRule(reduction(index=9, keepdim=9, sums=True), linear=0),
    "aten.mean.dim": _whole,
    "aten.mean.default": _all_whole,
    "aten.count_nonzero.dim_IntList": AxisRule(reduction(keepdim=9, sums=True)),
    "aten.count_nonzero.default": AxisRule(reduction(keepdim=9, sums=True)),
    "aten.max.default": _all_whole,
    "aten.min.default": _all_whole,
    "aten.any.default": _all_whole,
    "aten.all.default": _all_whole,
    "aten.prod.default": _all_whole,
    "aten.amax.default": _whole,
    "aten.amin.default": _whole,
    "aten.max.dim": _whole,
    "aten.min.dim": _whole,
    "aten.argmax.default": _whole,
    "aten.argmin.default": _whole,
    "aten.any.dim": _whole,
    "aten.any.dims": _whole,
    "aten.all.dim": _whole,
    "aten.prod.dim_int": _whole,
    "aten.median.dim": _order,
    "aten.nanmedian.dim": _order,
    "aten.mode.default": _order,
    "aten.kthvalue.default": AxisRule(reduction(2, 3, sums=False, default=-1)),
    "aten.logsumexp.default": _whole,
    "aten.var.correction": _whole,
    "aten.var_mean.correction": _whole,
    "aten.linalg_vector_norm.default": AxisRule(reduction(index=2, keepdim=3, sums=False)),
    "aten._softmax.default": AxisRule(softmax(1, 1)),
    "aten._log_softmax.default": AxisRule(softmax(1, 1)),
    "aten._softmax_backward_data.default": _softmax_backward,
    "aten._log_softmax_backward_data.default": _softmax_backward,
    "aten.cumsum.default": AxisRule(softmax(1, 1)),
    "aten.cumprod.default": AxisRule(softmax(1, 1)),
    "aten.logcumsumexp.default": AxisRule(softmax(1, 1)),
    "aten.cummax.default": AxisRule(along(1)),
    "aten.cummin.default": AxisRule(along(1)),
    "aten._cdist_forward.default": AxisRule(distances),
    "aten._cdist_backward.default": AxisRule(distances_backward, linear=0),
    "aten.native_layer_norm.default": AxisRule(layer_norm),
    "aten.native_layer_norm_backward.default": AxisRule(
        layer_norm_backward, linear=0, dense=(2, 3)
    ),
    "aten.native_batch_norm.default": AxisRule(batch_norm(5)),
    "aten._native_batch_norm_legit_no_training.default": AxisRule(batch_norm()),
    "aten.native_batch_norm_backward.default": AxisRule(batch_norm_backward, linear=0),
    "aten._fused_rms_norm.default": AxisRule(layer_norm),
    "aten._fused_rms_norm_backward.default": AxisRule(rms_norm_backward, linear=0),
}
