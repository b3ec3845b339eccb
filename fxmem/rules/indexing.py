"""Rows for ops that read or write by index: embedding, gather, scatter, topk."""

from __future__ import annotations

from fxmem.axes import ONE, AxisRule, Call, Dims, Signature, letters
from fxmem.rules.movement import along
from fxmem.sizes import same


def embedding(call: Call) -> Signature:
    index = letters("i", call.tensors[1].rank)
    return Signature(((("v",), ("e",)), index), ((*index, ("e",)),), frozenset("v"))


def embedding_backward(call: Call) -> Signature:
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
    """``x[i, j, ...]`` with leading tensor indices; indexed axes of ``x`` must be complete."""
    source, positions = call.tensors[0], list(call.args[1])
    if any(p is None for p in positions) or any(t.dtype.itemsize == 1 for t in call.tensors[1:]):
        return None
    n = len(positions)
    rank = call.out.rank - (source.rank - n)
    out = letters("i", rank)
    tail = letters("r", source.rank - n)
    indices = []
    for t in call.tensors[1:]:
        pad = rank - t.rank
        indices.append(
            tuple(
                ONE if t.shape[k] == 1 and call.out.shape[pad + k] != 1 else out[pad + k]
                for k in range(t.rank)
            )
        )
    first = letters("x", n)
    return Signature(((*first, *tail), *indices), ((*out, *tail),), frozenset(x for (x,) in first))


def index_select(call: Call) -> Signature:
    source = letters("d", call.tensors[0].rank)
    dim = call.args[1] % len(source)
    out = (*source[:dim], ("i",), *source[dim + 1 :])
    return Signature((source, (("i",),)), (out,), frozenset(source[dim]))


ROWS: dict[str, AxisRule] = {
    "aten.embedding.default": AxisRule(embedding),
    "aten.embedding_dense_backward.default": AxisRule(embedding_backward, linear=0),
    "aten.gather.default": AxisRule(gather),
    "aten.scatter.value": AxisRule(scatter),
    "aten.scatter.src": AxisRule(scatter),
    "aten.scatter_add.default": AxisRule(scatter),
    "aten.index.Tensor": AxisRule(index_tensor),
    "aten.index_select.default": AxisRule(index_select),
    "aten.topk.default": AxisRule(along(2, -1)),
    "aten.sort.default": AxisRule(along(1, -1)),
}
