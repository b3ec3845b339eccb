"""Rows for ops that read or write by index: embedding, gather, scatter, topk."""

from __future__ import annotations

from fxmem.axes.signature import ONE, AxisRule, Call, Dims, Signature, TensorInfo, letters
from fxmem.axes.sizes import same
from fxmem.rules.movement import along


def embedding(call: Call) -> Signature:
    index = letters("i", call.tensors[1].rank)
    return Signature(((("v",), ("e",)), index), ((*index, ("e",)),), frozenset("v"))


def embedding_backward(call: Call) -> Signature | None:
    """Arguments grad, index, rows, padding_idx, scale_grad_by_freq; the last needs all counts."""
    if call.arg(4, False):
        return None
    index = letters("i", call.tensors[1].rank)
    return Signature(((*index, ("e",)), index), ((("v",), ("e",)),))


def gather(call: Call) -> Signature:
    """Rows of the other axes are independent where source and index agree in size."""
    source, index = call.tensors[:2]
    dim = call.args[1] % source.rank if source.rank else 0
    dims, whole = _independent(dim, source.shape, index.shape)
    return Signature((dims, dims), (dims,), whole)


def scatter(call: Call) -> Signature:
    target, index = call.tensors[:2]
    dim = call.args[1] % target.rank if target.rank else 0
    dims, whole = _independent(dim, target.shape, index.shape)
    rest = (dims,) * (len(call.tensors) - 1)
    return Signature((dims, *rest), (dims,), whole)


def _independent(
    dim: int, source: tuple[object, ...], index: tuple[object, ...]
) -> tuple[Dims, frozenset[str]]:
    dims = letters("d", len(source))
    whole = {f"d{dim}"} | {
        f"d{i}" for i, (a, b) in enumerate(zip(source, index, strict=True)) if not same(a, b)
    }
    return dims, frozenset(whole)


def index_tensor(call: Call) -> Signature | None:
    """``x[:, i, j, ...]`` with tensor indices side by side; indexed axes must be complete."""
    source, positions = call.tensors[0], list(call.args[1])
    at = [i for i, p in enumerate(positions) if p is not None]
    if any(t.dtype.itemsize == 1 for t in call.tensors[1:]) or at[-1] - at[0] >= len(at):
        return None
    n, before = len(at), at[0]
    rank = call.out.rank - (source.rank - n)
    out = letters("i", rank)
    rest = letters("r", source.rank - n)
    indices = []
    for t in call.tensors[1:]:
        pad = rank - t.rank
        indices.append(
            tuple(
                ONE if t.shape[k] == 1 and call.out.shape[before + pad + k] != 1 else out[pad + k]
                for k in range(t.rank)
            )
        )
    gone = letters("x", n)
    ins = ((*rest[:before], *gone, *rest[before:]), *indices)
    return Signature(ins, ((*rest[:before], *out, *rest[before:]),), frozenset(x for (x,) in gone))


def index_select(call: Call) -> Signature:
    source = letters("d", call.tensors[0].rank)
    dim = call.args[1] % len(source)
    out = (*source[:dim], ("i",), *source[dim + 1 :])
    return Signature((source, (("i",),)), (out,), frozenset(source[dim]))


def indexed_write(call: Call) -> Signature:
    """Rows of one axis (argument 1), named by an index, are added to, replaced or filled."""
    target = call.tensors[0]
    dims = letters("d", target.rank)
    dim = call.args[1] % target.rank if target.rank else 0
    source = (*dims[:dim], ("i",), *dims[dim + 1 :])
    rest = (source,) * (len(call.tensors) - 2)
    return Signature((dims, (("i",),), *rest), (dims,), frozenset(("i", *dims[dim])))


def index_put(call: Call) -> Signature | None:
    """``x[:, i, j, ...] = values``: indexed axes and what names their entries must be complete."""
    if (read := index_tensor(Call(call.op, call.args[:2], {}, _indexed(call)))) is None:
        return None
    (entries,) = read.outs
    values, shape = call.tensors[-1], _indexed(call)[0].shape
    assert entries is not None
    pad = len(entries) - values.rank
    written = tuple(
        ONE if values.shape[k] == 1 and shape[pad + k] != 1 else entries[pad + k]
        for k in range(values.rank)
    )
    named = {x for dims in read.ins[1:] for d in dims for x in d}
    return Signature((*read.ins, written), (read.ins[0],), read.whole | named)


def _indexed(call: Call) -> tuple[TensorInfo, ...]:
    """What ``x[:, i, j, ...]`` would be."""
    source, indices = call.tensors[0], call.tensors[1:-1]
    before = next(i for i, p in enumerate(call.args[1]) if p is not None)
    rank = max(t.rank for t in indices)
    lead = [
        max((t.shape[k - rank] for t in indices if t.rank >= rank - k), key=lambda s: s != 1)
        for k in range(rank)
    ]
    rest = source.shape[before + len(indices) :]
    return (TensorInfo((*source.shape[:before], *lead, *rest), source.dtype),)


def bucketize(call: Call) -> Signature:
    """Each value is sought in sorted numbers: how many are below, a sum."""
    dims = letters("d", call.tensors[0].rank)
    return Signature((dims, (("v",),)), (dims,))


def searchsorted(call: Call) -> Signature | None:
    """Each row of values is sought in its row of sorted numbers: how many are below, a sum."""
    table, values = call.tensors[:2]
    if len(call.tensors) > 2 or table.rank != values.rank:
        return None
    rows = letters("d", values.rank - 1)
    return Signature(((*rows, ("s",)), (*rows, ("v",))), ((*rows, ("v",)),))


ROWS: dict[str, AxisRule] = {
    "aten.embedding.default": AxisRule(embedding),
    "aten.embedding_dense_backward.default": AxisRule(embedding_backward, linear=0),
    "aten.gather.default": AxisRule(gather),
    "aten.scatter.value": AxisRule(scatter),
    "aten.scatter.src": AxisRule(scatter),
    "aten.scatter_add.default": AxisRule(scatter),
    "aten.index.Tensor": AxisRule(index_tensor),
    "aten._unsafe_index.Tensor": AxisRule(index_tensor),
    "aten.index_select.default": AxisRule(index_select),
    "aten.index_add.default": AxisRule(indexed_write),
    "aten.index_copy.default": AxisRule(indexed_write),
    "aten.index_fill.int_Scalar": AxisRule(indexed_write),
    "aten.index_put.default": AxisRule(index_put),
    "aten._unsafe_index_put.default": AxisRule(index_put),
    "aten.scatter_reduce.two": AxisRule(scatter),
    "aten.bucketize.Tensor": AxisRule(bucketize),
    "aten.searchsorted.Tensor": AxisRule(searchsorted),
    "aten.topk.default": AxisRule(along(2, -1)),
    "aten.sort.default": AxisRule(along(1, -1)),
}
