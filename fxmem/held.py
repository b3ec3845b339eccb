"""Which values of a forward are worth holding until the backward.

A streamed backward makes every value of the forward again. The results of operators that read other
tokens (attention) are the dearest to make, quadratic in the length, and as small as a hidden state.
:mod:`fxmem.holding` decides which regions hold them.
"""

from __future__ import annotations

from torch import fx

from fxmem.joint import Joint
from fxmem.labels import Kind, Label, analyse
from fxmem.schedule import backward_nodes, producer
from fxmem.sizes import has_axis


def mixed(joint: Joint) -> list[fx.Node]:
    """Forward values that the backward reads, of operators that need a streamed value whole."""
    labels, late = analyse(joint, causal=True), backward_nodes(joint)

    def mixes(node: fx.Node) -> bool:
        operands = [(u.cut, labels.label.get(u.operand)) for u in labels.uses.get(node, ())]
        return any(
            cut is None and isinstance(label, Label) and label.kind is Kind.CUT
            for cut, label in operands
        )

    return [
        node
        for node in joint.graph.nodes
        if node not in late
        and isinstance(label := labels.label.get(node), Label)
        and label.kind is Kind.CUT
        and sum(has_axis(d) for d in joint.info[node].shape) == 1
        and any(user in late for user in node.users)
        and mixes(producer(node))
    ]
