"""Functions that chunk bodies call: reading and writing slices, adding into accumulators.

They are ordinary functions on tensors; bodies name them, so a printed body is the code that runs.
:class:`~fxmem.program.body_op.BodyOp` says what the facts declared beside them mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxmem.program.body_op import adds, body_op, nothing


@body_op()
def clamp(value: int, limit: int) -> int:
    """``value`` clipped to ``[0, limit]``: the first row of a chunk of a value with an offset."""
    return max(0, min(value, limit))


def _view(x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
    """``x`` with dimension ``dim`` split into ``outer, rows, inner``."""
    # said, not left to -1: another dimension may be empty
    rows = x.shape[dim] // (outer * inner)
    return x.reshape(*x.shape[:dim], outer, rows, inner, *x.shape[dim + 1 :])


@body_op(aliases=(0,))
def take(x: Tensor, dim: int, start: int, rows: int, outer: int = 1, inner: int = 1) -> Tensor:
    """Rows ``[start, start + rows)`` of an axis that stands as ``outer x length x inner`` in
    ``dim``.
    """
    if outer == 1:
        return x.narrow(dim, start * inner, rows * inner)
    return _view(x, dim, outer, inner).narrow(dim + 1, start, rows).flatten(dim, dim + 2)


def _one_entry(states: Tensor, index: int) -> Tensor:
    return states.new_empty(1, *states.shape[1:])


@body_op(aliases=(0,), fake=_one_entry)
def entry(states: Tensor, index: int) -> Tensor:
    """The state that chunk ``index`` began with, with a first dimension of 1."""
    return states.narrow(0, index, 1)


@body_op(writes=(0,), fake=nothing)
def put(
    buffer: Tensor, value: Tensor, dim: int, start: int, outer: int = 1, inner: int = 1
) -> None:
    """Write rows from ``start`` on."""
    if outer == 1:
        buffer.narrow(dim, start * inner, value.shape[dim]).copy_(value)
        return
    chunk = _view(value, dim, outer, inner)
    shape = (
        *buffer.shape[:dim],
        outer,
        buffer.shape[dim] // (outer * inner),
        inner,
        *buffer.shape[dim + 1 :],
    )
    buffer.view(shape).narrow(dim + 1, start, chunk.shape[dim + 1]).copy_(chunk)


@body_op(aliases=(0,), pure=True)
def contiguous(x: Tensor) -> Tensor:
    """``x`` itself where its rows already follow one another, as attention leaves them."""
    return x.contiguous()


@body_op(aliases=(0,))
def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """``x`` with its dimensions dense in memory in this order, the outermost first."""
    moved = x.permute(order)
    if moved.is_contiguous():
        return x
    back = sorted(range(x.dim()), key=order.__getitem__)
    return moved.contiguous().permute(back)


@body_op(writes=(0,), aliases=(0,))
def softmax_backward_(grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Gradient of a softmax over the last dimension in the place of ``grad``; returns it.

    The operator sums a row before it writes that row, but takes every result for contiguous.
    """
    op = torch.ops.aten._softmax_backward_data
    if grad.is_contiguous():
        return op.out(grad, out, dim, dtype, grad_input=grad)
    return grad.copy_(op(grad, out, dim, dtype))


@body_op(writes=(0,), aliases=(0,))
def log_softmax_backward_(grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """As :func:`softmax_backward_`, of a log-softmax."""
    op = torch.ops.aten._log_softmax_backward_data
    if grad.is_contiguous():
        return op.out(grad, out, dim, dtype, out=grad)
    return grad.copy_(op(grad, out, dim, dtype))


@body_op()
def zeros_like(x: Tensor) -> Tensor:
    """Zeros for another function to add into: a compiler would make equal ones one."""
    return torch.zeros_like(x)


def box(*values: object) -> list[object]:
    """Arguments in a list that their receiver may empty."""
    return list(values)


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] + before + after
    return x.new_empty(shape)


@body_op(aliases=(0,), fake=_padded)
def pad_rows(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zero rows before and after, along ``dim``."""
    if before == 0 and after == 0:
        return x
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - dim) + [before, after])


@body_op(writes=(0,), fake=nothing)
def hand_on(state: Tensor, after: Tensor) -> None:
    """The state that the next chunk of the loop begins with."""
    state.copy_(after)


@body_op(writes=(0,), fake=nothing)
def keep(kept: Tensor, value: Tensor, at: int, end: int) -> None:
    """Keep the value of the chunk that is at the end."""
    if at == end:
        kept.copy_(value)


@adds("value")
def add(acc: Tensor, value: Tensor) -> None:
    acc.add_(value)


@adds("total")
def add_rows(acc: Tensor, value: Tensor, dim: int, start: int) -> None:
    """Add to the rows of ``acc`` from ``start`` on: the gradient of a slice."""
    acc.narrow(dim, start, value.shape[dim]).add_(value)


@adds("product", "aten.mm.default")
def add_mm(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """``acc += a @ b`` in the precision of ``acc``, without a temporary of its size."""
    if a.shape[1]:
        acc.addmm_(a.to(acc.dtype), b.to(acc.dtype))


@body_op(writes=(0,), aliases=(0,))
def plus_mm(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x += a @ b`` in place, for ``x`` with the elements of the product in order; returns it."""
    rows = x.view(a.shape[0], b.shape[1]) if x.is_contiguous() else None
    if rows is not None and a.shape[1] and x.dtype == a.dtype == b.dtype:
        rows.addmm_(a, b)
        return x
    return x.add_(torch.mm(a, b).reshape(x.shape))


@adds("total", "aten.bmm.default")
def add_bmm(acc: Tensor, a: Tensor, b: Tensor) -> None:
    if a.shape[2]:
        acc.baddbmm_(a.to(acc.dtype), b.to(acc.dtype))


@adds("total", "aten.embedding_dense_backward.default", (3,))
def add_embedding(acc: Tensor, grad: Tensor, index: Tensor, padding_idx: int) -> None:
    """Gradient of an embedding table, added row by row."""
    index, grad = index.reshape(-1), grad.reshape(-1, grad.shape[-1])
    if padding_idx >= 0:
        grad = grad.masked_fill((index == padding_idx).unsqueeze(-1), 0)
    acc.index_add_(0, index, grad.to(acc.dtype))


def expert_rows(index: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """``(expert, rows that chose it)`` for every expert with rows."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=experts)[:experts].tolist()
    out, at = [], 0
    for expert, count in enumerate(counts):
        if count:
            out.append((expert, order[at : at + count]))
        at += count
    return out


def _even_expert_weight(acc: Tensor, grad: Tensor, x: Tensor, index: Tensor) -> None:
    """One expert with its even share of the rows: how many it gets is known at run time only."""
    rows = index.new_empty(math.ceil(index.shape[0] / acc.shape[0]))
    acc[0].addmm_(grad[rows].t().to(acc.dtype), x[rows].to(acc.dtype))


@adds("total", "fxmem.expert_weight_grad.default", average=_even_expert_weight)
def add_expert_weight(acc: Tensor, grad: Tensor, x: Tensor, index: Tensor) -> None:
    """``acc[e] += grad[rows of e]^T @ x[rows of e]`` for ``acc [E, O, I]``."""
    for expert, rows in expert_rows(index, acc.shape[0]):
        acc[expert].addmm_(grad[rows].t().to(acc.dtype), x[rows].to(acc.dtype))
