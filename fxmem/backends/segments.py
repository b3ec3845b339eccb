"""Segments: the runs of plain tensor operators in a chunk body, between calls of other functions.

A body reads and writes slices, adds into accumulators and calls attention kernels; these stay as
they are, in their order. What lies between them is pure and can be compiled. A segment ends where a
function needs one of its results, and at every function that writes, so nothing moves across a
write.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem.program.body_op import BODY_OPS
from fxmem.rewriting.aliases import storages, written

_OUTSIDE = (
    torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
)  # fmt: skip
MATMULS = frozenset(f"aten.{n}.default" for n in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"))


@dataclass(slots=True)
class Segment:
    """Nodes of a body that run together; ``inputs`` come from outside, ``outputs`` leave.

    ``donated``: inputs whose storage was made in this body for them alone and has no reader after
    the segment, so that a result may take it.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    donated: set[fx.Node] = field(default_factory=set)

    @property
    def gains(self) -> bool:
        """At least two operators that a compiler can fuse."""
        return sum(_fuses(n) for n in self.nodes) > 1


def plain(node: fx.Node) -> bool:
    """A pure operator, the same for every call of its body."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, _compat.OpOverload):
        known = BODY_OPS.get(node.target)
        return known is not None and known.pure
    op = node.target
    return (
        op.namespace in ("aten", "prims")
        and not op._schema.is_mutable
        and not any(tag in op.tags for tag in _OUTSIDE)
    )


def _fuses(node: fx.Node) -> bool:
    """Neither a matrix product, which stays a library call, nor a view."""
    if not isinstance(node.target, _compat.OpOverload) or str(node.target) in MATMULS:
        return False
    return str(node.target) != "aten.reshape.default" and not _compat.may_alias(node)


def segments(graph: fx.Graph) -> list[Segment | fx.Node]:
    """The body as segments and single nodes, in an order that runs."""
    out: list[Segment | fx.Node] = []
    current = Segment()
    inside: set[fx.Node] = set()
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken:
            continue
        if plain(node):
            # a tuple does not leave its segment: its elements come along
            parts = [u for u in node.users if u.target is operator.getitem]
            current.nodes += [node, *parts]
            inside.update((node, *parts))
            taken.update(parts)
            continue
        if node.op == "output" or _ends(node, inside):
            if current.nodes:
                out.append(current)
            current, inside = Segment(), set()
        out.append(node)
    for one in out:
        if isinstance(one, Segment):
            _bounds(one)
    _donate(out, graph)
    return out


def _donate(parts: list[Segment | fx.Node], graph: fx.Graph) -> None:
    storage = storages(graph)
    last: dict[fx.Node, int] = {}
    for i, part in enumerate(parts):
        for node in part.nodes if isinstance(part, Segment) else [part]:
            for root in map(storage.get, node.all_input_nodes):
                if root is not None:
                    last[root] = i
    for i, part in enumerate(parts):
        if isinstance(part, Segment):
            roots = [storage.get(n) for n in part.inputs]
            leaves = {storage.get(n) for n in part.outputs}
            part.donated = {
                n for n, root in zip(part.inputs, roots, strict=True)
                if root is not None and last[root] == i and roots.count(root) == 1
                and root not in leaves
            }  # fmt: skip


def _ends(node: fx.Node, inside: set[fx.Node]) -> bool:
    if node.op != "call_function":
        return False
    return bool(written(node)) or any(a in inside for a in node.all_input_nodes)


def _bounds(segment: Segment) -> None:
    own = set(segment.nodes)
    given: dict[fx.Node, Any] = {}
    for node in segment.nodes:
        given.update((a, None) for a in node.all_input_nodes if a not in own)
    segment.inputs = list(given)
    segment.outputs = [n for n in segment.nodes if any(u not in own for u in n.users)]
