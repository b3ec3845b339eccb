"""Sums by index: ``zeros(V, d).index_add(0, ids, x)`` and ``index_put(..., accumulate=True)``, the
gradient of ``table[ids]`` among them, are what the backward of an embedding is: chunks add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxmem.frontend.joint import Joint
from fxmem.passes.shifts import is_zero
from fxmem.rewriting.patterns import is_op
from fxmem.rewriting.pipeline import Edit, LocalPass


@dataclass(frozen=True, slots=True)
class IndexedSums(LocalPass[Joint]):
    """Rewrite sums into rows of a table of zeros whose size is known."""

    name: str = "indexed_sums"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        for node in list(joint.graph.nodes):
            found = _read(node)
            if found is not None and _fits(joint, node, *found):
                yield partial(_rewrite, joint, node, *found)


def _read(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Rows that are added, and where."""
    args: Any = node.args
    if is_op(node, "aten.index_add.default"):
        known = not node.kwargs and args[1] == 0 and is_zero(args[0])
        return (args[3], args[2]) if known else None
    if is_op(node, "aten.index_put.default", "aten._unsafe_index_put.default"):
        known = len(args) > 3 and args[3] is True and len(args[1]) == 1 and is_zero(args[0])
        return (args[2], args[1][0]) if known and args[1][0] is not None else None
    return None


def _fits(joint: Joint, node: fx.Node, rows: fx.Node, index: fx.Node) -> bool:
    out, given, where = (joint.info[n] for n in (node, rows, index))
    full = given.shape == (*where.shape, *out.shape[1:])
    numbers = where.dtype in (torch.int64, torch.int32) and given.dtype == out.dtype
    floats = out.dtype in (torch.float64, torch.float32)
    return full and numbers and floats and out.rank == 2 and out.shape[0].is_Integer


def _rewrite(joint: Joint, node: fx.Node, rows: fx.Node, index: fx.Node) -> None:
    count = int(joint.info[node].shape[0])
    # one may count from the end
    index = joint.call(node, torch.ops.aten.remainder.Scalar, (index, count), like=index)
    args = (rows, index, count, -1, False)
    new = joint.call(node, torch.ops.aten.embedding_dense_backward.default, args, like=node)
    joint.replace(node, new)
    joint.graph.eliminate_dead_code()
