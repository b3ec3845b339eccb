"""Channel labels: every tensor axis as a direct sum of products of atoms.

An *atom* is a set of interchangeable positions that several axes share. Axes that an op ties are
unified (union-find, Tarjan 1975); an atom of unequal size is cut into a product ``outer x inner``,
a split, slice or join into a direct sum. What cannot be said this way fixes the atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod


class Atom:
    """``size`` positions; after a cut ``ref`` holds the axis that stands for it."""

    __slots__ = ("attention", "fixed", "parent", "ref", "size")

    def __init__(self, size: int, fixed: str | None = None) -> None:
        self.size = size
        self.fixed = fixed
        self.parent: Atom | None = None
        self.ref: Axis | None = None
        self.attention = False


Segment = tuple[Atom, ...]
Axis = tuple[Segment, ...]


def fresh(size: int, fixed: str | None = None) -> Axis:
    return ((),) if size == 1 and fixed is None else ((Atom(size, fixed),),)


def root(atom: Atom) -> Atom:
    while atom.parent is not None:
        atom = atom.parent
    return atom


def width(segment: Segment) -> int:
    return prod(a.size for a in segment)


def length(axis: Axis) -> int:
    return sum(width(s) for s in axis)


def resolve(axis: Axis) -> Axis:
    """``axis`` with cut atoms replaced; a sum is opened only where it is outermost."""
    out: list[Segment] = []
    for segment in axis:
        out.extend(_open(segment))
    return tuple(out)


def _open(segment: Segment) -> list[Segment]:
    for i, atom in enumerate(segment):
        at = root(atom)
        if at.ref is None or (len(at.ref) > 1 and i > 0):
            continue
        return [
            piece for inner in at.ref for piece in _open((*segment[:i], *inner, *segment[i + 1 :]))
        ]
    return [tuple(root(a) for a in segment)]


def leaves(axis: Axis) -> list[Atom]:
    """Every atom below ``axis`` that is not cut."""
    out: list[Atom] = []
    for segment in resolve(axis):
        for atom in segment:
            out.extend([atom] if atom.ref is None else leaves(atom.ref))
    return out


def fix(axis: Axis, reason: str) -> None:
    for atom in leaves(axis):
        atom.fixed = atom.fixed or reason


def bind(atom: Atom, axis: Axis) -> None:
    atom = root(atom)
    atom.ref = axis
    if atom.fixed:
        fix(axis, atom.fixed)
    if atom.attention:
        for segment in axis[:1]:
            for a in segment[:1]:
                root(a).attention = True


def unify(a: Axis, b: Axis, op: str) -> None:
    """Tie two axes of equal length position by position; ``op`` is named where that fails."""
    a, b = resolve(a), resolve(b)
    if length(a) != length(b):
        for axis in (a, b):
            fix(axis, f"{op} ties axes of {length(a)} and {length(b)}")
        return
    if len(a) == 1 and len(b) == 1:
        _unify_products(a[0], b[0], op)
        return
    left, right = list(a), list(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        n, m = width(x), width(y)
        if n != m:
            whole, rest, at = (x, left, m) if n > m else (y, right, n)
            parts = divide(whole, at)
            if parts is None:
                for axis in (a, b):
                    fix(axis, f"{op} mixes parts and products")
                return
            rest.insert(0, parts[1])
            x, y = (parts[0], y) if n > m else (x, parts[0])
        _unify_products(x, y, op)


def divide(segment: Segment, at: int) -> tuple[Segment, Segment] | None:
    """Cut a segment in two at position ``at``."""
    opened = resolve((segment,))
    if len(opened) != 1 or not opened[0]:
        return None
    first, *rest = opened[0]
    inner = prod(a.size for a in rest)
    if at % inner or root(first).ref is not None:
        return None
    head, tail = Atom(at // inner), Atom(first.size - at // inner)
    bind(first, ((head,), (tail,)))
    return (head, *rest), (tail, *rest)


def _unify_products(x: Segment, y: Segment, op: str) -> None:
    left, right = list(x), list(y)
    while left and right:
        a, b = root(left.pop()), root(right.pop())
        if a is b:
            continue
        if a.size == b.size:
            _merge(a, b, op)
            continue
        big, small, rest = (a, b, left) if a.size > b.size else (b, a, right)
        if big.size % small.size or big.ref is not None:
            # what is further out is not tied either
            fix((x, y), f"{op} regroups sizes {a.size} and {b.size}")
            return
        outer = Atom(big.size // small.size)
        bind(big, ((outer, small),))
        rest.append(outer)


def _merge(a: Atom, b: Atom, op: str) -> None:
    ref_a, ref_b = a.ref, b.ref
    b.parent = a
    reason = a.fixed or b.fixed
    a.attention = a.attention or b.attention
    a.ref = ref_a or ref_b
    if reason:
        a.fixed = reason
        fix(((a,),), reason)
    if ref_a is not None and ref_b is not None:
        unify(ref_a, ref_b, op)


def nested(parts: Sequence[Axis]) -> Axis:
    """The axis that counts through ``parts`` as loops do, the first outermost."""
    head, *rest = map(resolve, parts)
    inner: list[Atom] = []
    for axis in rest:
        if len(axis) == 1:
            inner.extend(axis[0])
        else:  # a sum stays closed unless it is outermost
            inner.append(Atom(length(axis)))
            inner[-1].ref = axis
    return tuple((*segment, *inner) for segment in head)


def pick(axis: Axis, sizes: tuple[int, ...]) -> list[Axis]:
    """Cut ``axis`` at ``sizes`` (their sum is its length); pieces share atoms with it."""
    pieces: list[Axis] = [fresh(n) for n in sizes]
    joined: Axis = tuple(s for p in pieces for s in p)
    unify(axis, joined, "split")
    return [resolve(p) for p in pieces]


def path(axis: Axis, atom: Atom) -> list[tuple[tuple[str, int, int], ...]]:
    """Where ``atom`` sits in ``axis``: steps ("segment", offset, length), ("outer", inner size, 0),
    ("inner", outer size, 0); one path per segment that holds it."""
    found, offset = [], 0
    opened = resolve(axis)
    for segment in opened:
        n = width(segment)
        for i, a in enumerate(segment):
            if a is atom:
                steps: list[tuple[str, int, int]] = []
                if len(opened) > 1:
                    steps.append(("segment", offset, n))
                before = prod(x.size for x in segment[:i])
                after = prod(x.size for x in segment[i + 1 :])
                if before > 1:
                    steps.append(("inner", before, 0))
                if after > 1:
                    steps.append(("outer", after, 0))
                found.append(tuple(steps))
        offset += n
    return found
