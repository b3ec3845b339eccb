"""Scatter into sums: ``zeros.scatter_add(i, s) + x`` becomes ``x.scatter_add(i, s)``.

The gradient of a value that a loss both picks from and reads as a whole (log-probabilities of
tokens, and their entropy) is such a sum: as wide as the logits, for one number per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from fxmem.frontend.joint import Joint
from fxmem.rewriting.patterns import is_op
from fxmem.rewriting.pipeline import Edit, LocalPass

_ZEROS = ("aten.zeros.default", "aten.zeros_like.default")


@dataclass(frozen=True, slots=True)
class ScatterIntoSums(LocalPass[Joint]):
    """Rewrite sums of which nobody else reads the scattered part."""

    name: str = "scatter_into_sums"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        for node in list(joint.graph.nodes):
            if not is_op(node, "aten.add.Tensor") or node.kwargs:
                continue
            for part, rest in (node.args[:2], node.args[1::-1]):
                if _fits(joint, node, part, rest):
                    yield partial(_scatter, joint, node, part, rest)
                    break


def _fits(joint: Joint, node: fx.Node, part: object, rest: object) -> bool:
    if not isinstance(part, fx.Node) or not isinstance(rest, fx.Node):
        return False
    if not is_op(part, "aten.scatter_add.default") or len(part.users) > 1:
        return False
    alike = joint.info[part] == joint.info[rest] == joint.info[node]
    return alike and is_op(part.args[0], *_ZEROS)


def _scatter(joint: Joint, node: fx.Node, part: fx.Node, rest: fx.Node) -> None:
    args = (rest, *part.args[1:])
    new = joint.call(node, torch.ops.aten.scatter_add.default, args, like=node)
    joint.replace(node, new)
    joint.graph.eliminate_dead_code()
