"""Axis signatures: how the output axes of an op relate to its input axes.

Streaming is sharding in time: a tensor cut along the sequence is a shard, a weight gradient summed
over chunks is a partial sum, K and V that every later query needs are a gather. One signature per
op says all of it. Terms:

*Letter*: a named axis inside one op call. *Dim*: one tensor dimension, a product of letters ``(b
s)``; the empty product is a dimension of size 1. *Signature*: the dims of every tensor operand and
output, plus the letters that must be complete (``whole``), for example the axis of a softmax.

A letter of the inputs that is missing from an output was contracted away: chunks of it add up
(PARTIAL). A rule computes the signature of one call; the table is in :mod:`fxmem.rules`. An op
without a rule is a barrier: it runs on whole operands, exact, and the report names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from fxmem._compat.graph import tree_leaves
from fxmem.axes.sizes import UNIT, ZERO, Size, T, divide, linear, product, same
from fxmem.errors import PlanError

Dim = tuple[str, ...]
Dims = tuple[Dim, ...]
ONE: Dim = ()
_EMPTY = sympy.Symbol("empty", integer=True, positive=True)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape (symbolic) and dtype of a tensor operand or output."""

    shape: tuple[Size, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)


@dataclass(frozen=True, slots=True)
class Call:
    """One op call: ``args``/``kwargs`` hold a :class:`TensorInfo` in place of every tensor."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: tuple[TensorInfo | None, ...]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Tensor operands in argument order."""
        leaves = tree_leaves(
            (self.args, dict(self.kwargs)), is_leaf=lambda x: isinstance(x, TensorInfo)
        )
        return tuple(x for x in leaves if isinstance(x, TensorInfo))

    @property
    def out(self) -> TensorInfo:
        """The first output, of a call that has one."""
        out = self.outs[0]
        assert out is not None
        return out

    def arg(self, index: int, default: Any = None) -> Any:
        """A positional argument, or the default where the call ends before it."""
        return self.args[index] if index < len(self.args) else default


@dataclass(frozen=True, slots=True)
class Order:
    """Of a call whose rows see rows of other operands, and may see no later ones (attention).

    ``rows``: the operand whose rows look. ``keys``: operands that they look at. ``sums``: gradients
    of those. ``mask``: the operand that hides keys where there is one. ``placed``: letters that
    must be complete where later keys are hidden, since a chunk does not know their positions.
    """

    rows: int
    keys: tuple[int, ...]
    sums: tuple[int, ...] = ()
    mask: int | None = None
    placed: str = ""


@dataclass(frozen=True, slots=True)
class Signature:
    """Axis letters of operands and outputs of one call.

    ``whole``: letters that must be complete. ``prefix``: operand indices that are needed whole but,
    under a causal mask, only up to the last row of the chunk. ``suffix``: outputs that are sums
    over chunks whose row ``r`` is final once every chunk at or after ``r`` has run. ``shift``:
    letter -> number of input rows skipped before output row 0 (a slice with an offset). ``fills``:
    rows that no input row moves to are zero, so that results of chunks add up. ``sums``: False
    where a missing letter is not a sum. ``extent``: size of the letters that share a
    dimension with others. ``carried``: letter -> 1 or -1, along which a chunk needs a state of the
    chunk before it, or after it. Dimension 0 of a state counts chunks: the last output is the state
    that came in, and ``states`` are operands that are such outputs of other ops. ``initial``: the
    operand that it starts from, where that is not zeros; ``final``: the output that is the state at
    the end. ``order``: what ``prefix`` and ``suffix`` are made of where a mask decides. ``counts``:
    letters of ``whole`` that are there only because an argument of the call counts them; positions
    along them do not meet.
    """

    ins: tuple[Dims, ...]
    outs: tuple[Dims | None, ...]
    whole: frozenset[str] = frozenset()
    prefix: frozenset[int] = frozenset()
    suffix: frozenset[int] = frozenset()
    shift: Mapping[str, Size] = field(default_factory=dict)
    fills: bool = False
    sums: bool = True
    extent: Mapping[str, Size] = field(default_factory=dict)
    carried: Mapping[str, int] = field(default_factory=dict)
    states: frozenset[int] = frozenset()
    initial: int | None = None
    final: int | None = None
    order: Order | None = None
    counts: frozenset[str] = frozenset()

    def hiding(self, later: bool) -> Signature:
        """The same call where keys later than a row are hidden from it, or are not."""
        order = self.order
        assert order is not None
        whole = self.whole - {*order.placed}
        if not later:
            return replace(self, whole=whole, prefix=frozenset(), suffix=frozenset())
        return replace(
            self, whole=whole | {*order.placed}, prefix=frozenset(order.keys),
            suffix=frozenset(order.sums),
        )  # fmt: skip


Rule = Callable[[Call], Signature | None]


@dataclass(frozen=True, slots=True)
class AxisRule:
    """A row of the table.

    ``rule``: the signature, or ``None`` where this call has none. ``sizes``: index of the argument
    that holds the output shape and follows the chunk. ``place``: index of the argument that says
    where the chunk lies, ``[dim, outer, inner, start, length]``, in ops whose elements depend on
    their position; empty for the whole. ``cheap``: the op may be recomputed wherever
    a slice of it is needed (pointwise, views, factories). ``linear``: index of the tensor operand
    in which the op is linear row by row, so that zero rows stay zero. ``product``: the two tensor
    operands that the op multiplies: its result is affine in each of them. ``step``: what runs on a
    chunk in place of an op whose signature has a letter ``carried``: ``step(state, *arguments) ->
    (*outputs but states, next state)``. ``dense``: tensor operands that the op's kernel reads as if
    they were contiguous, without a look at their strides.
    """

    rule: Rule
    sizes: int | None = None
    cheap: bool = False
    linear: int | None = None
    place: int | None = None
    product: tuple[int, int] | None = None
    step: Callable[..., tuple[Any, ...]] | None = None
    dense: tuple[int, ...] = ()


def letters(prefix: str, count: int) -> Dims:
    """One letter per dimension: ``d0``, ``d1`` and so on for the prefix ``d``."""
    return tuple((f"{prefix}{i}",) for i in range(count))


_LEAD = ("...",)


@dataclass(frozen=True, slots=True)
class Einsum:
    """A rule that a text gives; see :func:`einsum`."""

    ins: tuple[Dims, ...]
    outs: tuple[Dims, ...]
    whole: frozenset[str]

    def __call__(self, call: Call) -> Signature | None:
        if self.misfit(call):
            return None
        lead = letters("lead", self._leading(call.tensors[0]))

        def spelled(dims: Dims) -> Dims:
            return (*lead, *dims[1:]) if dims[:1] == (_LEAD,) else dims

        return Signature(tuple(map(spelled, self.ins)), tuple(map(spelled, self.outs)), self.whole)

    def misfit(self, call: Call) -> str:
        """Why the call has other operands than the text; empty where it has not."""
        if len(call.tensors) != len(self.ins):
            return f"its row has {len(self.ins)} operands, the call {len(call.tensors)}"
        lead = self._leading(call.tensors[0])
        for number, (dims, t) in enumerate(zip(self.ins, call.tensors, strict=True), 1):
            rank = len(dims) + (lead - 1 if dims[:1] == (_LEAD,) else 0)
            if t.rank != rank:
                return f"operand {number} has {t.rank} dimensions, in its row {rank}"
        return ""

    def _leading(self, first: TensorInfo) -> int:
        """How many dimensions ``...`` stands for."""
        return max(0, first.rank - len(self.ins[0]) + 1) if self.ins[0][:1] == (_LEAD,) else 0


def einsum(spec: str, whole: str = "") -> Einsum:
    """A rule from text like ``"m k, k n -> m n"``.

    ``...`` in front stands for any number of dimensions, as many as the first operand has.

    Raises:
        PlanError: the text has no arrow, ``...`` behind a letter or not in the first operand, or a
            ``whole`` letter that it does not name.
    """
    left, arrow, right = spec.partition("->")
    ins, outs = (
        tuple(tuple((a,) for a in part.split()) for part in side.split(","))
        for side in (left, right)
    )
    known = {x for dims in (*ins, *outs) for x in dims}
    late = any(_LEAD in dims[1:] for dims in (*ins, *outs))
    unled = _LEAD in known and _LEAD not in ins[0]
    unknown = sorted(set(whole.split()) - {x for (x,) in known})
    if not arrow or late or unled or unknown:
        reason = (
            "it has no ->" if not arrow else "... stands behind a letter" if late
            else "... is not in the first operand" if unled else f"it names no {unknown[0]}"
        )  # fmt: skip
        raise PlanError(f"the row {spec!r} is not understood: {reason}")
    return Einsum(ins, outs, frozenset(whole.split()))


def broadcast(call: Call, operands: Sequence[TensorInfo], out: TensorInfo) -> tuple[Dims, ...]:
    """Dims of ``operands``, aligned right to ``out``; a broadcast one is the empty product."""
    result = []
    for t in operands:
        pad = out.rank - t.rank
        result.append(
            tuple(
                ONE if t.shape[i] == 1 and out.shape[pad + i] != 1 else (f"d{pad + i}",)
                for i in range(t.rank)
            )
        )
    return tuple(result)


def regroup(
    shape_in: Sequence[Size], shape_out: Sequence[Size]
) -> tuple[Dims, Dims, dict[str, Size]] | None:
    """Letters of a reshape by common refinement of the two shapes, with the size of each letter.

    ``None`` where the shapes have no common refinement that can be shown symbolically. A dimension
    of size zero on both sides is refined as any other size, so that the rest of the shape shows.
    """
    if [list(s).count(ZERO) for s in (shape_in, shape_out)] == [1, 1]:
        shape_in, shape_out = ([_EMPTY if d == 0 else d for d in s] for s in (shape_in, shape_out))
    bounds: list[Size] = []
    for shape in (shape_in, shape_out):
        acc: Size = product(())
        for d in shape:
            acc = product((acc, d))
            if not any(same(acc, b) for b in bounds):
                bounds.append(acc)
    ordered = _chain(bounds)
    if ordered is None:
        return None
    table: dict[str, Size] = {}
    previous: Size = product(())
    for i, b in enumerate(ordered):
        factor = divide(b, previous)
        assert factor is not None
        table[f"a{i}"] = factor
        previous = b
    table = {k: v for k, v in table.items() if v != 1}

    def dims(shape: Sequence[Size]) -> Dims | None:
        names, out = list(table), []
        for d in shape:
            taken: list[str] = []
            acc = product(())
            while not same(acc, d):
                if not names:
                    return None
                taken.append(names.pop(0))
                acc = product((acc, table[taken[-1]]))
                if divide(d, acc) is None:
                    return None
            out.append(tuple(taken))
        return tuple(out)

    left, right = dims(shape_in), dims(shape_out)
    if left is None or right is None or sorted(sum(left, ())) != sorted(sum(right, ())):
        return None
    return left, right, {k: v.xreplace({_EMPTY: ZERO}) for k, v in table.items()}


def _chain(bounds: list[Size]) -> list[Size] | None:
    """``bounds`` ordered so that each divides the next."""
    rest, out, previous = list(bounds), [], product(())
    while rest:
        fits = [
            b
            for b in rest
            if divide(b, previous) is not None and all(divide(o, b) is not None for o in rest)
        ]
        if not fits:
            return None
        out.append(fits[0])
        previous = fits[0]
        rest.remove(fits[0])
    return out


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a value carries the streamed axis: dimension ``dim`` is ``outer x length x inner``
    elements.

    Row ``r`` of the axis belongs to anchor position ``r + offset`` of the streamed axis, so the
    chunk of anchors ``[lo, hi)`` holds rows ``[lo - offset, hi - offset)`` clipped to ``[0,
    length)``.
    """

    dim: int
    length: Size
    offset: Size = ZERO
    outer: Size = UNIT
    inner: Size = UNIT

    def aligned(self, other: Cut) -> bool:
        return same(self.offset, other.offset) and same(self.length, other.length)

    def shape(self, shape: Sequence[Size], rows: Size) -> tuple[Size, ...]:
        """``shape`` with the cut dimension holding ``rows`` rows."""
        out = list(shape)
        out[self.dim] = product((self.outer, rows, self.inner))
        return tuple(out)


def locate(
    dims: Dims, shape: Sequence[Size], cut: Cut, table: Mapping[str, Size]
) -> tuple[str, Cut] | None:
    """The letter of ``dims`` that ``cut`` falls into, and the cut relative to it (dim -1)."""
    dim = dims[cut.dim]
    if len(dim) == 1:
        return dim[0], Cut(-1, cut.length, cut.offset, cut.outer, cut.inner)
    before: Size = product(())
    for i, letter in enumerate(dim):
        extent = table.get(letter)
        if extent is None:
            return None
        after = product(table[x] for x in dim[i + 1 :])
        outer, inner = divide(cut.outer, before), divide(cut.inner, after)
        if (
            outer is not None
            and inner is not None
            and same(product((outer, cut.length, inner)), extent)
        ):
            return letter, Cut(-1, cut.length, cut.offset, outer, inner)
        before = product((before, extent))
    return None


def place(letter: str, relative: Cut, dims: Dims, table: Mapping[str, Size]) -> Cut | None:
    """The cut of a value whose ``dims`` contain ``letter``; ``None`` where they do not."""
    for index, dim in enumerate(dims):
        if letter in dim:
            at = dim.index(letter)
            if len(dim) > 1 and any(x not in table for x in dim):
                return None
            outer = product([*(table[x] for x in dim[:at]), relative.outer])
            inner = product([relative.inner, *(table[x] for x in dim[at + 1 :])])
            return Cut(index, relative.length, relative.offset, outer, inner)
    return None


def axis_cuts(shape: Sequence[Size]) -> tuple[Cut, ...]:
    """The cuts a value of this shape allows, with row 0 at anchor 0; lengths may be ``T - k``."""
    out = []
    for i, d in enumerate(shape):
        parts = linear(d)
        if parts is not None:
            outer, rest = parts
            excess = divide(rest, outer)
            if excess is not None and excess.is_Integer and excess <= 0:
                out.append(Cut(i, T + excess, outer=outer))
    return tuple(out)
