"""Loops: which values get a buffer, which are accumulated, and what each loop computes.

Each stage with something to produce is one loop over the chunks. Its body is the backward closure
of what it produces, stopping at values that exist already. A value of an earlier stage that is
needed again is recomputed if it stems from the forward and kept in a buffer if it stems from the
backward, unless it is wider than a hidden state. Loop directions are chosen to minimise loops
first, then bytes of buffers.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxmem.axes.signature import Cut, TensorInfo
from fxmem.axes.sizes import has_axis, per_token
from fxmem.frontend.joint import Joint
from fxmem.rules.movement import ROWS as MOVEMENT
from fxmem.streaming.flex_slices import can_slice
from fxmem.streaming.labels import (
    ASCENDING,
    DESCENDING,
    STATES,
    Fact,
    Kind,
    Label,
    Labels,
    Use,
    analyse,
    labels_direction,
    tensor_operands,
)

MAX_STAGES = 5
"""Directions are searched for this many loops; later loops ascend."""


@dataclass(slots=True)
class Loop:
    """One pass over the chunks: ``nodes`` in order, ``buffers`` written, ``sums`` accumulated."""

    stage: int
    direction: int
    nodes: list[fx.Node] = field(default_factory=list)
    buffers: list[fx.Node] = field(default_factory=list)
    sums: list[fx.Node] = field(default_factory=list)


@dataclass(slots=True)
class Schedule:
    """``straight[k]`` runs before loop ``k``; ``loops`` are in order; ``flex`` values asked for
    whole; ``held`` values are given whole, as inputs are.
    """

    labels: Labels
    roots: list[fx.Node]
    loops: list[Loop]
    straight: dict[int, list[fx.Node]]
    buffers: set[fx.Node]
    held: list[fx.Node]

    @property
    def cost(self) -> tuple[int, float]:
        """Number of loops, elements per token of buffers that are not results."""
        info = self.labels.joint.info
        held = [info[n] for n in self.buffers]
        held += [info[n] for loop in self.loops for n in loop.sums]
        return len(self.loops), sum(
            per_token(i.shape) for i in held if any(has_axis(d) for d in i.shape)
        )


def schedule(
    joint: Joint, roots: Sequence[fx.Node], *, causal: bool, held: Sequence[fx.Node] = (),
    ranks: bool = False,
) -> Schedule:  # fmt: skip
    """The cheapest schedule that produces ``roots``, where ``held`` values exist already."""
    facts: dict[fx.Node, Fact] = {}
    best = build(joint, roots, causal=causal, directions=(), held=held, ranks=ranks, facts=facts)
    if ranks or (len(best.loops) <= 1 and not best.labels.carries):
        return best  # over ranks no direction is better, and the buffers of one loop are results
    depth = min(MAX_STAGES, 1 + max((loop.stage for loop in best.loops), default=-1))
    for directions in itertools.product((ASCENDING, DESCENDING), repeat=depth):
        if DESCENDING in directions or best.labels.carries:  # all ascend: that is the first
            candidate = build(
                joint, roots, causal=causal, directions=directions, held=held, facts=facts
            )
            best = min(best, candidate, key=lambda s: s.cost)
    return best


def build(
    joint: Joint, roots: Sequence[fx.Node], *, causal: bool, directions: Sequence[int],
    held: Sequence[fx.Node] = (), ranks: bool = False, facts: dict[fx.Node, Fact] | None = None,
) -> Schedule:  # fmt: skip
    labels = analyse(
        joint, causal=causal, directions=directions, held=held, ranks=ranks, facts=facts
    )
    need = _Needs(labels, list(roots), held)
    loops: dict[int, Loop] = {}
    for node in joint.graph.nodes:
        label = labels.label.get(node)
        if not isinstance(label, Label):
            continue
        if node in need.buffers or (label.kind is Kind.PARTIAL and node in need.items):
            loop = loops.setdefault(
                label.stage, Loop(label.stage, labels_direction(labels, label.stage))
            )
            (loop.sums if label.kind is Kind.PARTIAL else loop.buffers).append(node)
    order = {n: i for i, n in enumerate(joint.graph.nodes)}
    for stage, loop in loops.items():
        body = need.body(stage, [*loop.buffers, *loop.sums])
        loop.nodes = sorted(body, key=order.__getitem__)
    straight: dict[int, list[fx.Node]] = {}
    for node in joint.graph.nodes:
        if node in need.items and node.op != "placeholder" and node not in need.buffers:
            label = labels.of(node)
            if label.kind in (Kind.STRAIGHT, Kind.FLEX):
                straight.setdefault(label.stage, []).append(node)
    run = {producer(n) for n in need.items}
    labels.barriers = [b for b in labels.barriers if b.node in run]
    in_order = [loops[k] for k in sorted(loops)]
    return Schedule(labels, list(roots), in_order, straight, need.buffers, list(held))


class _Needs:
    """Transitive requirements of the roots: ``items`` exist as whole tensors, ``buffers`` are
    written by loops.
    """

    def __init__(self, labels: Labels, roots: list[fx.Node], held: Collection[fx.Node]) -> None:
        self.labels = labels
        self.held = set(held)
        self.items: set[fx.Node] = set()
        self.buffers: set[fx.Node] = set()
        self._backward = backward_nodes(labels.joint)
        self._limit = max(
            (
                per_token(i.shape)
                for i in map(labels.joint.info.get, labels.joint.inputs)
                if i is not None and _streams(i)
            ),
            default=0.0,
        )
        self._work: list[fx.Node] = []
        for r in roots:
            self.whole(r)
        while self._work:
            self._expand(self._work.pop())

    def whole(self, node: fx.Node) -> None:
        """``node`` must exist as a complete tensor."""
        if node in self.items or node in self.held:
            return
        self.items.add(node)
        if self.labels.of(node).kind is Kind.CUT:
            self.buffers.add(node)
        self._work.append(node)

    def _expand(self, node: fx.Node) -> None:
        label = self.labels.of(node)
        if label.kind in (Kind.CUT, Kind.PARTIAL):
            self.body(label.stage, [node])
            return
        source = producer(node)
        for use in self.labels.uses.get(source, ()):
            self.whole(use.operand)

    def body(self, stage: int, products: Sequence[fx.Node]) -> set[fx.Node]:
        """Nodes that loop ``stage`` runs for ``products``; what it reads whole becomes an item."""
        seen: set[fx.Node] = set(products)
        stack = [producer(p) for p in products]
        expanded: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in expanded:
                continue
            expanded.add(node)
            state = self.labels.states.get(node)
            if state is not None and self.labels.of(state).stage < stage:
                self.whole(state)  # the chunk is made again, from the state it began with
            for use in self.labels.uses.get(node, ()):
                for n in self._operand(use, stage):
                    seen.add(n)
                    stack.append(producer(n))
        return {n for n in seen | expanded if n.op == "call_function"}

    def _operand(self, use: Use, stage: int) -> list[fx.Node]:
        label = self.labels.of(use.operand)
        if label.kind is Kind.FLEX:
            if self._sliced(use):
                self._flex(use.operand)
            else:
                self.whole(use.operand)
            return []
        if use.cut is None or label.kind in (Kind.STRAIGHT, Kind.PARTIAL):
            self.whole(use.operand)
            return []
        if use.cut != label.cut:
            self.whole(use.operand)
            return []
        if use.operand in self.held:
            return []
        if use.operand in self.buffers and label.stage < stage:
            return []
        if label.stage < stage and (use.cut == STATES or self._keep(use.operand)):
            self.whole(use.operand)
            return []
        return [use.operand]

    def _sliced(self, use: Use) -> bool:
        """The FLEX operand is made chunk by chunk where it is used, and not read from a whole."""
        shape = self.labels.joint.info[use.operand].shape
        cut = use.cut
        if cut is None and use.mask:
            if not has_axis(shape[-2]):
                return True
            cut = Cut(len(shape) - 2, shape[-2])
        return cut is not None and can_slice(self.labels, use.operand, cut)

    def _keep(self, node: fx.Node) -> bool:
        """Backward values of an earlier loop are kept unless they are wider than a hidden state.

        Of a value that was only moved, what it was made from is kept.
        """
        info = self.labels.joint.info[node]
        return (
            node in self._backward
            and str(node.target) not in MOVEMENT
            and isinstance(info, TensorInfo)
            and per_token(info.shape) <= self._limit
        )

    def _flex(self, node: fx.Node) -> None:
        """The leaves of a FLEX value must exist; the value itself is sliced where it is used."""
        for operand in tensor_operands(node, self.labels.joint):
            if self.labels.of(operand).kind is Kind.FLEX:
                self._flex(operand)
            else:
                self.whole(operand)


def producer(node: fx.Node) -> fx.Node:
    """The op behind a value: a tuple's getitem stands for the call that made the tuple."""
    while node.op == "call_function" and node.target is operator.getitem:
        node = node.args[0]
    return node


def _streams(info: Any) -> bool:
    return (
        isinstance(info, TensorInfo)
        and info.dtype.is_floating_point
        and any(has_axis(d) for d in info.shape)
    )


def backward_nodes(joint: Joint) -> set[fx.Node]:
    """The tangents and everything that follows from them."""
    reached = {t for t in joint.tangents if t is not None}
    for n in joint.graph.nodes:
        if any(a in reached for a in n.all_input_nodes):
            reached.add(n)
    return reached


__all__ = ["Loop", "Schedule", "build", "producer", "schedule"]
