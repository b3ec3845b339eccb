"""Global mean: a mean over the streamed axis becomes a sum over chunks divided by the whole count.

The mean of a chunk divides by the chunk's length; the sum is what adds up.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from fxmem.axes import TensorInfo
from fxmem.joint import Joint
from fxmem.sizes import has_axis


@dataclass(frozen=True, slots=True)
class GlobalMean:
    """Rewrite means whose reduced axes carry the streamed one."""

    name: str = "global_mean"

    def run(self, joint: Joint) -> Joint:
        joint = joint.copy()
        graph = joint.graph
        for node in list(graph.nodes):
            if str(node.target) not in ("aten.mean.dim", "aten.mean.default"):
                continue
            source = node.args[0]
            info: TensorInfo = joint.info[source]
            reduced = _reduced(node, len(info.shape))
            if not any(has_axis(info.shape[d]) for d in reduced):
                continue
            with graph.inserting_before(node):
                total = _sum(graph, node, source)
                count: object = 1
                for d in reduced:
                    size = graph.call_function(torch.ops.aten.sym_size.int, (source, d))
                    size.meta["val"] = source.meta["val"].shape[d]
                    joint.info[size] = None
                    product = graph.call_function(operator.mul, (count, size))
                    product.meta["val"] = _value(count) * size.meta["val"]
                    joint.info[product] = None
                    count = product
                mean = graph.call_function(torch.ops.aten.div.Tensor, (total, count))
            for new in (total, mean):
                new.meta.update(node.meta)
                joint.info[new] = joint.info[node]
            node.replace_all_uses_with(mean)
            joint.outputs = [mean if o is node else o for o in joint.outputs]
            joint.grads = [mean if o is node else o for o in joint.grads]
            graph.erase_node(node)
        return joint


def _value(count: object) -> object:
    return count.meta["val"] if isinstance(count, fx.Node) else count


def _reduced(node: fx.Node, rank: int) -> list[int]:
    dims = node.args[1] if len(node.args) > 1 else None
    return [d % rank for d in dims] if dims else list(range(rank))


def _sum(graph: fx.Graph, node: fx.Node, source: fx.Node) -> fx.Node:
    if str(node.target) == "aten.mean.default":
        return graph.call_function(torch.ops.aten.sum.default, (source,), dict(node.kwargs))
    return graph.call_function(torch.ops.aten.sum.dim_IntList, tuple(node.args), dict(node.kwargs))
