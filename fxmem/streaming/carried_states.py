"""A node for the state that each op with a carried letter receives.

A loop may have to make such an op's chunk again, and what it needs for that is a value like any
other: it can be kept, held from the forward to the backward, and read chunk by chunk.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from fxmem.axes.sizes import CHUNKS
from fxmem.frontend.joint import Joint
from fxmem.rules import carries_state


def with_states(joint: Joint) -> Joint:
    """``joint`` itself, in which every state has a node; after the passes, which drop what nobody
    reads. Noted is the shape that all of a loop's states have together.
    """
    for node in list(joint.graph.nodes):
        if carries_state(node.target):
            state = state_of(node, joint) or _added(joint, node)
            info = joint.info[state]
            joint.info[state] = replace(info, shape=(CHUNKS, *info.shape[1:]))
    return joint


def state_of(node: fx.Node, joint: Joint) -> fx.Node | None:
    """The last result of an op, where it has a node."""
    last = len(joint.info[node]) - 1
    return next((u for u in node.users if u.args[1] == last), None)


def _added(joint: Joint, node: fx.Node) -> fx.Node:
    last = len(joint.info[node]) - 1
    with joint.graph.inserting_after(node):
        state = joint.graph.call_function(operator.getitem, (node, last))
    state.meta["val"], joint.info[state] = node.meta["val"][last], joint.info[node][last]
    if node in joint.learned:
        joint.learned.add(state)
    return state
