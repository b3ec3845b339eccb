"""Positions of a graph at which a single state is alive: the layer boundaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx

from fxmem.axes.sizes import T, per_token
from fxmem.frontend.capture import Capture, is_size, value_of

State = tuple[fx.Node, float]
"""A value and its bytes per token."""


def waists(capture: Capture, main: Sequence[fx.Node]) -> set[int]:
    """Positions ``p`` such that a region may end before ``main[p]``.

    A single state is alive there, beside values under a quarter of its size (router logits that
    pass by), and it has the size that most of these positions share. States of another length are
    counted by themselves, where each stands alone first and at most one streamed state is alive.
    """
    streamed = _large_states(capture, main, T)
    found = {p for p, _ in _changes(streamed)}
    for length in capture.lengths[1:]:
        seen: set[fx.Node] = set()
        for p, state in _changes(_large_states(capture, main, length)):
            beside = streamed[p]
            if state not in seen and beside is not None and len(beside) <= 1:
                found.add(p)
            seen.add(state)
    return found


def changes(main: Sequence[fx.Node], owners: Mapping[str, int]) -> set[int]:
    """Positions before which the group of the parameters changes, or earlier ones where a tuple of
    tensors is alive there.
    """
    order = {n: i for i, n in enumerate(main)}
    found: set[int] = set()
    known: int | None = None
    free = tuples = 0  # where a cut may be, and up to where a tuple is alive
    for p, n in enumerate(main):
        if p >= tuples:
            free = p
        for owner in dict.fromkeys(owners[a.name] for a in n.all_input_nodes if a.name in owners):
            if known not in (None, owner):
                found.add(free)
            known = owner
        if isinstance(value_of(n), (tuple, list)) and not is_size(value_of(n)):
            tuples = max([tuples, *(order[u] + 1 for u in n.users if u in order)])
    return found


def along(capture: Capture, nodes: Sequence[fx.Node]) -> Capture:
    """The capture in which ``T`` is the length that most of ``nodes`` have, by bytes."""
    if len(capture.lengths) == 1:
        return capture
    count: dict[sympy.Symbol, float] = dict.fromkeys(capture.lengths, 0.0)
    for n in nodes:
        for s in _symbols(capture, n) & count.keys():
            count[s] += _per_token(capture, n)
    own = max(count, key=lambda s: count[s])
    if own == T:
        return capture
    swap = {T: own, own: T}
    return replace(
        capture, symbols={s: e.xreplace(swap) for s, e in capture.symbols.items()},
        assumed=[g.xreplace(swap) for g in capture.assumed], length=own,
    )  # fmt: skip


def _changes(states: Sequence[Sequence[State] | None]) -> list[tuple[int, fx.Node]]:
    """Where a state begins to be alone that has the size of most."""
    sizes = [s[0][1] if s is not None and len(s) == 1 else None for s in states]
    runs = [v for p, v in enumerate(sizes) if v is not None and (p == 0 or sizes[p - 1] != v)]
    if not runs:
        return []
    residual = Counter(runs).most_common(1)[0][0]
    return [
        (p, here[0][0]) for p, here in enumerate(states)
        if p and here is not None and sizes[p] == residual and sizes[p - 1] != residual
    ]  # fmt: skip


def _symbols(capture: Capture, node: fx.Node) -> set[sympy.Symbol]:
    """Of the sizes of a value of floating point."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return set()
    return set().union(*(d.free_symbols for d in capture.shape(node)))


def _per_token(capture: Capture, node: fx.Node) -> float:
    """Bytes of a tensor."""
    return per_token(capture.shape(node)) * float(value_of(node).dtype.itemsize)


def _large_states(
    capture: Capture, main: Sequence[fx.Node], axis: sympy.Symbol
) -> list[list[State] | None]:
    """The states along ``axis`` that are alive before each node, without those that are small
    beside them; None inside a tuple.
    """
    order = {n: i for i, n in enumerate(main)}
    ends: dict[int, list[fx.Node]] = {}
    alive: dict[fx.Node, float] = {}
    out: list[list[State] | None] = []
    sizes: dict[int, float | None] = {}  # by value: equal layers share theirs
    tuples = -1  # last use of a tuple of tensors: no cut before it
    for p, n in enumerate(main):
        for gone in ends.pop(p, ()):
            del alive[gone]
        largest = max(alive.values(), default=0.0)
        large = [one for one in alive.items() if one[1] >= largest / 4]
        out.append(large if tuples < 0 else None)
        value = value_of(n)
        last = max((order[u] for u in n.users if u in order), default=-1)
        tuples = max(
            tuples, last if isinstance(value, (tuple, list)) and not is_size(value) else -1
        )
        tuples = -1 if tuples <= p else tuples
        if last > p and id(value) not in sizes:
            own = _symbols(capture, n)
            along = axis in own and (axis == T or T not in own)
            sizes[id(value)] = _per_token(capture, n) if along else None
        if last > p and (size := sizes[id(value)]) is not None:
            alive[n] = size
            ends.setdefault(last + 1, []).append(n)
    return out
