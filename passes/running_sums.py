"""Running sums: cumulative sums along the streamed axis as ops that hand their sum from chunk to
chunk.

Autograd writes the backward of a cumulative sum as flip, cumulative sum, flip; so do people who
want a sum from the end. A flip needs the axis whole, a sum that runs downwards does not.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxmem.axes.sizes import has_axis
from fxmem.frontend.joint import Joint
from fxmem.kernels import carried  # noqa: F401  (registers the ops)
from fxmem.rewriting.patterns import is_op
from fxmem.rewriting.pipeline import Edit, LocalPass

_SUM = "aten.cumsum.default"
_FLIP = "aten.flip.default"
_FORMS = {
    _SUM: torch.ops.fxmem.running_sum.default,
    "aten.logcumsumexp.default": torch.ops.fxmem.running_logsumexp.default,
}


@dataclass(frozen=True, slots=True)
class RunningSums(LocalPass[Joint]):
    """Rewrite cumulative sums over tokens, and fold the flips around them."""

    name: str = "running_sums"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        for node in list(joint.graph.nodes):
            if is_op(node, *_FORMS) and _runs(joint, node):
                yield partial(_rewrite, joint, node)
        for node in list(joint.graph.nodes):
            found = _reversed(joint, node)
            if found is not None:
                yield partial(_fold, joint, node, *found)
        joint.graph.eliminate_dead_code()


def _runs(joint: Joint, node: fx.Node) -> bool:
    """Along the streamed axis of a value that is to be cut, in its own dtype."""
    info, source = joint.info[node], joint.info[node.args[0]]
    along = info.rank and has_axis(info.shape[node.args[1] % info.rank])
    floats = info.dtype.is_floating_point and info.dtype == source.dtype
    return bool(along) and floats and node in joint.learned


def _rewrite(joint: Joint, node: fx.Node) -> None:
    source, dim = node.args[:2]
    op = _FORMS[str(node.target)]
    joint.replace(node, joint.first_of(node, op, (source, dim % joint.info[node].rank, False)))


def _reversed(joint: Joint, node: Any) -> tuple[fx.Node, fx.Node] | None:
    """``flip(sum(flip(x)))`` along the sum's axis: the sum and ``x``."""
    inner: Any = node.args[0] if is_op(node, _FLIP) else node
    if inner is node or inner.target is not operator.getitem or inner.args[1] != 0:
        return None
    call = inner.args[0]
    if call.target not in _FORMS.values():
        return None
    source, rank = call.args[0], joint.info[node].rank
    dims = [[d % rank for d in n.args[1]] for n in (node, source) if is_op(n, _FLIP)]
    return (call, source.args[0]) if dims == [[call.args[1]]] * 2 else None


def _fold(joint: Joint, node: fx.Node, call: fx.Node, source: fx.Node) -> None:
    _, dim, reverse = call.args
    joint.replace(node, joint.first_of(node, call.target, (source, dim, not reverse)))
