"""Global mean: a mean over the streamed axis becomes a sum over chunks divided by the whole count.

The mean of a chunk divides by the chunk's length; the sum is what adds up.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from fxmem.axes.signature import TensorInfo
from fxmem.axes.sizes import has_axis
from fxmem.frontend.joint import Joint
from fxmem.rewriting.pipeline import Edit, LocalPass


@dataclass(frozen=True, slots=True)
class GlobalMean(LocalPass[Joint]):
    """Rewrite means whose reduced axes carry the streamed one."""

    name: str = "global_mean"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        for node in list(joint.graph.nodes):
            if str(node.target) in _SUMS:
                info: TensorInfo = joint.info[node.args[0]]
                reduced = _reduced(node, len(info.shape))
                if any(has_axis(info.shape[d]) for d in reduced):
                    yield partial(_divide, joint, node, reduced)


_SUMS = {
    "aten.mean.dim": torch.ops.aten.sum.dim_IntList,
    "aten.mean.default": torch.ops.aten.sum.default,
}


def _divide(joint: Joint, node: fx.Node, reduced: list[int]) -> None:
    source, count = node.args[0], None
    assert isinstance(source, fx.Node)
    total = joint.call(node, _SUMS[str(node.target)], node.args, dict(node.kwargs), like=node)
    for d in reduced:
        value = source.meta["val"].shape[d]
        size = joint.number(node, torch.ops.aten.sym_size.int, (source, d), value)
        if count is not None:
            value = count.meta["val"] * value
            size = joint.number(node, operator.mul, (count, size), value)
        count = size
    mean = joint.call(node, torch.ops.aten.div.Tensor, (total, count), like=node)
    joint.replace(node, mean)
    joint.graph.erase_node(node)


def _reduced(node: fx.Node, rank: int) -> list[int]:
    dims = node.args[1] if len(node.args) > 1 else None
    return [d % rank for d in dims] if dims else list(range(rank))
