"""Drop identities: dropout that drops nothing disappears before the graph is cut into regions.

It would make the first layer differ from the others, which then could not share a program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import fx

from fxmem.rewriting.pipeline import Edit, LocalPass


@dataclass(frozen=True, slots=True)
class DropIdentities(LocalPass[fx.GraphModule]):
    """Remove dropout calls with ``p == 0`` or outside training."""

    name: str = "drop_identities"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in (F.dropout, torch.dropout):
                continue
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            if p == 0 or training is False:
                yield partial(_drop, node)


def _drop(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)
