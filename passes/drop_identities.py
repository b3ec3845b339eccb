"""Drop identities: dropout that drops nothing disappears before the graph is cut into regions.

It would make the first layer differ from the others, which then could not share a program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from fxmem.pipeline import copy_graph


@dataclass(frozen=True, slots=True)
class DropIdentities:
    """Remove dropout calls with ``p == 0`` or outside training."""

    name: str = "drop_identities"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = copy_graph(gm)
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in (F.dropout, torch.dropout):
                continue
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            if p == 0 or training is False:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
        return gm
