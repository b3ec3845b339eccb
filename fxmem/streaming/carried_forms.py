"""The chunk form of ops that hand a state from chunk to chunk.

In the loop that an op belongs to, its state stands in a buffer of one entry that the body replaces
at its end. Any other loop makes the op's chunk again, from the state that the chunk began with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from fxmem.kernels.carried import STEPS
from fxmem.rules import lookup
from fxmem.streaming.labels import STATES
from fxmem.streaming.loop_body import Body


def carried(body: Body, node: fx.Node) -> tuple[Any, ...]:
    """The results of the op in this chunk, the state it began with last; to be handed on: see
    :attr:`Body.handed_on`.
    """
    state = body.labels.states[node]
    own = node in body.carried
    before = body.input(body.carried[node]) if own else body.chunk(state, STATES)
    call = body.copy(node, body.labels.uses[node], None)
    call.target, call.args = step_of(node.target), (before, *call.args)
    count = len(body.joint.info[node])
    results = [body.call(operator.getitem, call, i) for i in range(count)]
    if own:
        body.handed_on.append((before, results[-1]))
    return (*results[:-1], before)


def step_of(target: Any) -> Callable[..., tuple[Any, ...]]:
    """What a chunk runs in place of an op that has a carried letter."""
    row = lookup(target)
    return STEPS[str(target)] if row is None or row.step is None else row.step
