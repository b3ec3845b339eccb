"""Rows for ops that move elements without arithmetic: reshapes, permutations, slices, joins,
factories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxmem.axes.signature import ONE, AxisRule, Call, Dims, Signature, TensorInfo, letters, regroup
from fxmem.axes.sizes import Size, has_axis, same, size


def _axis(index: int, rank: int) -> int:
    return index % rank if rank else 0


def _dims(t: TensorInfo, prefix: str = "d") -> Dims:
    return tuple(ONE if t.shape[i] == 1 else (f"{prefix}{i}",) for i in range(t.rank))


def reshape(call: Call) -> Signature | None:
    split = regroup(call.tensors[0].shape, call.out.shape)
    return split and Signature((split[0],), (split[1],), extent=split[2])


def expand(call: Call) -> Signature:
    source, out = call.tensors[0], call.out
    pad = out.rank - source.rank
    dims = tuple(ONE if source.shape[i] == 1 else (f"d{pad + i}",) for i in range(source.rank))
    return Signature((dims,), (letters("d", out.rank),))


def permute(call: Call) -> Signature:
    source = letters("d", call.tensors[0].rank)
    order = [_axis(d, len(source)) for d in call.args[1]]
    return Signature((source,), (tuple(source[d] for d in order),))


def transpose(call: Call) -> Signature:
    source = list(letters("d", call.tensors[0].rank))
    out = list(source)
    if source:
        i, j = (_axis(d, len(source)) for d in (call.arg(1, 0), call.arg(2, 1)))
        out[i], out[j] = out[j], out[i]
    return Signature((tuple(source),), (tuple(out),))


def unsqueeze(call: Call) -> Signature:
    source = letters("d", call.tensors[0].rank)
    at = _axis(call.args[1], len(source) + 1)
    return Signature((source,), ((*source[:at], ONE, *source[at:]),))


def squeeze(call: Call) -> Signature:
    """Emitted as a reshape: squeezing a chunk of one row would drop the cut axis."""
    t = call.tensors[0]
    source = _dims(t)
    if len(call.args) > 1:
        given = call.args[1]
        drop = {_axis(d, t.rank) for d in (given if isinstance(given, Sequence) else (given,))}
    else:
        drop = set(range(t.rank))
    return Signature((source,), (tuple(d for i, d in enumerate(source) if i not in drop or d),))


def cut_slice(call: Call) -> Signature | None:
    """``x[start:end]`` along one axis: rows move by ``start``; strides other than 1 need the axis
    whole.
    """
    t = call.tensors[0]
    dim = _axis(call.arg(1, 0), t.rank)
    source = letters("d", t.rank)
    if call.arg(4, 1) != 1:
        return Signature((source,), (source,), frozenset((f"d{dim}",)))
    start = position(call.arg(2), t.shape[dim])
    if start is None:
        return Signature((source,), (source,), frozenset((f"d{dim}",)))
    return Signature((source,), (source,), shift={f"d{dim}": start})


def position(value: Any, length: Size) -> Size | None:
    """The first row of a slice; None where it may count from either end."""
    start = size(0 if value is None else value)
    if start.is_negative:
        return start + length
    return start if start.is_nonnegative else None


def slice_backward(call: Call) -> Signature | None:
    dim = _axis(call.args[2], call.out.rank)
    source = letters("d", call.out.rank)
    if call.args[5] != 1:
        return Signature((source,), (source,), frozenset((f"d{dim}",)))
    start = position(call.args[3], call.out.shape[dim])
    if start is None:
        return Signature((source,), (source,), frozenset((f"d{dim}",)))
    return Signature((source,), (source,), shift={f"d{dim}": -start}, fills=True)


def select(call: Call) -> Signature:
    source = letters("d", call.tensors[0].rank)
    dim = _axis(call.args[1], len(source))
    out = tuple(d for i, d in enumerate(source) if i != dim)
    return Signature((source,), (out,), frozenset(source[dim]))


def select_backward(call: Call) -> Signature:
    out = letters("d", call.out.rank)
    dim = _axis(call.args[2], len(out))
    return Signature(
        (tuple(d for i, d in enumerate(out) if i != dim),), (out,), frozenset(out[dim])
    )


def cat(call: Call) -> Signature:
    rank = call.out.rank
    dim = _axis(call.arg(1, 0), rank)
    dims = letters("d", rank)
    return Signature((dims,) * len(call.tensors), (dims,), frozenset(dims[dim]))


def stack(call: Call) -> Signature:
    rank = call.out.rank
    dim = _axis(call.arg(1, 0), rank)
    dims = letters("d", rank)
    source = tuple(d for i, d in enumerate(dims) if i != dim)
    return Signature((source,) * len(call.tensors), (dims,), frozenset(dims[dim]))


def split(call: Call) -> Signature:
    source = letters("d", call.tensors[0].rank)
    dim = _axis(call.arg(2, 0), len(source))
    return Signature((source,), (source,) * len(call.outs), frozenset(source[dim]))


def unbind(call: Call) -> Signature:
    source = letters("d", call.tensors[0].rank)
    dim = _axis(call.arg(1, 0), len(source))
    out = tuple(d for i, d in enumerate(source) if i != dim)
    return Signature((source,), (out,) * len(call.outs), frozenset(source[dim]))


def repeat(call: Call) -> Signature:
    """Counts stay as they are in a chunk, so that copies, ``t -> (r t)``, must be complete."""
    source, out = call.tensors[0], call.out
    pad = out.rank - source.rank
    ins, outs = [], list(letters("d", out.rank))
    extent: dict[str, Size] = {}
    whole = {f"d{i}" for i in range(pad)}
    for i, (old, new) in enumerate(zip(source.shape, out.shape[pad:], strict=True), pad):
        ins.append(ONE if old == 1 and new != 1 else (f"d{i}",))
        if not same(old, new) and old == 1:
            whole.add(f"d{i}")
        elif not same(old, new):
            outs[i] = (f"r{i}", f"d{i}")
            extent |= {f"r{i}": size(call.args[1][i]), f"d{i}": old}
            whole.add(f"r{i}")
    return Signature((tuple(ins),), (tuple(outs),), frozenset(whole), extent=extent)


def along(index: int, default: int | None = None) -> Any:
    """Same dims in and out; the axes named by argument ``index`` must be complete."""

    def rule(call: Call) -> Signature:
        rank = call.tensors[0].rank
        given = call.arg(index, default)
        axes = given if isinstance(given, Sequence) else range(rank) if given is None else (given,)
        dims = letters("d", rank)
        whole = frozenset(dims[_axis(d, rank)][0] for d in axes) if rank else frozenset[str]()
        return Signature((dims,) * len(call.tensors), (dims,) * len(call.outs), whole)

    return rule


def pad(call: Call) -> Signature:
    """Axes that are padded must be complete, also where as much is cut off at the other end."""
    rank = call.tensors[0].rank
    dims = letters("d", rank)
    given = call.args[1]  # before and after, from the last axis on
    whole = frozenset(f"d{rank - 1 - i // 2}" for i, n in enumerate(given) if size(n) != 0)
    return Signature((dims,), (dims,), whole)


def scattered(call: Call) -> Signature:
    """A part of an axis, or one entry of it, is written over: argument 2 names it."""
    source, part = call.tensors[:2]
    dims = letters("d", source.rank)
    dim = _axis(call.arg(2, 0), source.rank)
    less = part.rank < source.rank
    written = tuple(d for i, d in enumerate(dims) if not (less and i == dim))
    return Signature((dims, written), (dims,), frozenset(dims[dim]))


def unfold(call: Call) -> Signature:
    """Windows of one axis, in a new last axis."""
    dims = letters("d", call.tensors[0].rank)
    dim = _axis(call.args[1], len(dims))
    return Signature((dims,), ((*dims, ("w",)),), frozenset((*dims[dim], "w")))


def unfold_backward(call: Call) -> Signature:
    dims = letters("d", call.out.rank)
    dim = _axis(call.args[2], len(dims))
    return Signature(((*dims, ("w",)),), (dims,), frozenset((*dims[dim], "w")))


def _diagonal(matrix: TensorInfo, first: int, second: int) -> tuple[Dims, Dims, frozenset[str]]:
    """Dims of the matrices, of their diagonals, and what must be complete."""
    dims = letters("d", matrix.rank)
    pair = {_axis(first, matrix.rank), _axis(second, matrix.rank)}
    rest = tuple(d for i, d in enumerate(dims) if i not in pair)
    return dims, (*rest, ("g",)), frozenset({"g", *(f"d{i}" for i in pair)})


def diagonal(call: Call) -> Signature:
    matrix, line, whole = _diagonal(call.tensors[0], call.arg(2, 0), call.arg(3, 1))
    return Signature((matrix,), (line,), whole)


def diagonal_backward(call: Call) -> Signature:
    matrix, line, whole = _diagonal(call.out, *call.args[3:5])
    return Signature((line,), (matrix,), whole)


def diag_embed(call: Call) -> Signature:
    matrix, line, whole = _diagonal(call.out, call.arg(2, -2), call.arg(3, -1))
    return Signature((line,), (matrix,), whole)


def as_pairs(call: Call) -> Signature:
    """Real and imaginary part in a new last axis."""
    dims = letters("d", call.tensors[0].rank)
    return Signature((dims,), ((*dims, ("z",)),), frozenset("z"))


def of_pairs(call: Call) -> Signature:
    dims = letters("d", call.out.rank)
    return Signature(((*dims, ("z",)),), (dims,), frozenset("z"))


def factory(call: Call) -> Signature:
    """A constant: no operand matters, every output axis may be cut."""
    return Signature(tuple((ONE,) * t.rank for t in call.tensors), (letters("d", call.out.rank),))


def like(call: Call) -> Signature:
    dims = letters("d", call.out.rank)
    return Signature((dims,), (dims,))


def arange(call: Call) -> Signature | None:
    """Counting restarts in every chunk, so a range is cut only by slicing it whole."""
    dims = letters("d", 1)
    return None if has_axis(call.out.shape[0]) else Signature((), (dims,), frozenset(dims[0]))


_view = AxisRule(reshape, sizes=1, cheap=True, linear=0)
_same = AxisRule(like, cheap=True, linear=0)

ROWS: dict[str, AxisRule] = {
    "aten.view.default": _view,
    "aten._unsafe_view.default": _view,
    "aten.reshape.default": _view,
    "aten.expand.default": AxisRule(expand, sizes=1, cheap=True, linear=0),
    "aten.permute.default": AxisRule(permute, cheap=True, linear=0),
    "aten.transpose.int": AxisRule(transpose, cheap=True, linear=0),
    "aten.t.default": AxisRule(transpose, cheap=True, linear=0),
    "aten.unsqueeze.default": AxisRule(unsqueeze, cheap=True, linear=0),
    "aten.squeeze.dim": AxisRule(squeeze, sizes=1, cheap=True, linear=0),
    "aten.squeeze.dims": AxisRule(squeeze, sizes=1, cheap=True, linear=0),
    "aten.squeeze.default": AxisRule(squeeze, sizes=1, cheap=True, linear=0),
    "aten.slice.Tensor": AxisRule(cut_slice, cheap=True, linear=0),
    "aten.slice_backward.default": AxisRule(slice_backward, sizes=1, linear=0),
    "aten.select.int": AxisRule(select, cheap=True, linear=0),
    "aten.select_backward.default": AxisRule(select_backward, sizes=1, linear=0),
    "aten.cat.default": AxisRule(cat, cheap=True),
    "aten.stack.default": AxisRule(stack, cheap=True),
    "aten.split.Tensor": AxisRule(split, cheap=True, linear=0),
    "aten.split_with_sizes.default": AxisRule(split, cheap=True, linear=0),
    "aten.unbind.int": AxisRule(unbind, cheap=True, linear=0),
    "aten.repeat.default": AxisRule(repeat, cheap=True, linear=0),
    "aten.slice_scatter.default": AxisRule(scattered),
    "aten.select_scatter.default": AxisRule(scattered),
    "aten.unfold.default": AxisRule(unfold, cheap=True, linear=0),
    "aten.unfold_backward.default": AxisRule(unfold_backward, sizes=1, linear=0),
    "aten.diagonal.default": AxisRule(diagonal, cheap=True, linear=0),
    "aten.diagonal_backward.default": AxisRule(diagonal_backward, sizes=1, linear=0),
    "aten.diag_embed.default": AxisRule(diag_embed, linear=0),
    "aten.view_as_real.default": AxisRule(as_pairs, cheap=True, linear=0),
    "aten.view_as_complex.default": AxisRule(of_pairs, cheap=True, linear=0),
    "aten.flip.default": AxisRule(along(1), linear=0),
    "aten.roll.default": AxisRule(along(2), linear=0),
    "aten.constant_pad_nd.default": AxisRule(pad),
    "aten.clone.default": _same,
    "aten.detach.default": _same,
    "aten.alias.default": _same,
    "aten.lift_fresh_copy.default": _same,
    "aten._to_copy.default": _same,
    "aten.arange.start_step": AxisRule(arange, cheap=True),
    "aten.arange.start": AxisRule(arange, cheap=True),
    "aten.arange.default": AxisRule(arange, cheap=True),
    "aten.full.default": AxisRule(factory, sizes=0, cheap=True),
    "aten.zeros.default": AxisRule(factory, sizes=0, cheap=True),
    "aten.ones.default": AxisRule(factory, sizes=0, cheap=True),
    "aten.empty.memory_format": AxisRule(factory, sizes=0, cheap=True),
    "aten.new_zeros.default": AxisRule(factory, sizes=1, cheap=True),
    "aten.new_ones.default": AxisRule(factory, sizes=1, cheap=True),
    "aten.new_full.default": AxisRule(factory, sizes=1, cheap=True),
    "aten.new_empty.default": AxisRule(factory, sizes=1, cheap=True),
    "aten.full_like.default": AxisRule(like, cheap=True),
    "aten.zeros_like.default": AxisRule(like, cheap=True),
    "aten.ones_like.default": AxisRule(like, cheap=True),
    "aten.empty_like.default": AxisRule(like, cheap=True),
}
