"""The chunk form of ops that hand a state from chunk to chunk.

In the loop that an op belongs to, its state stands in a buffer of one entry that the body replaces
at its end. Any other loop makes the op's chunk again, from the state that the chunk began with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from fxmem.axes.sizes import HI, LO, T
from fxmem.frontend.joint import Joint
from fxmem.kernels import carried as kernels
from fxmem.kernels import recurrence
from fxmem.rules import carries_state, lookup
from fxmem.streaming.labels import STATES, signature_of
from fxmem.streaming.loop_body import Body

STEPS: dict[str, Callable[..., Any]] = {
    **kernels.STEPS,
    "fxmem.recurrence.default": recurrence.recurrence_step,
    "fxmem.recurrence_backward.default": recurrence.recurrence_backward_step,
}
"""By op: what a chunk runs."""
RECURRENCE = "fxmem.recurrence.default"


def carried(body: Body, node: fx.Node) -> tuple[Any, ...]:
    """The results of the op in this chunk, the state it began with last; to be handed on: see
    :attr:`Body.handed_on`.
    """
    state = body.labels.states[node]
    own = node in body.carried
    before = body.input(body.carried[node]) if own else body.chunk(state, STATES)
    call = body.copy(node, body.labels.uses[node], None)
    call.target, call.args = step_of(node.target), (before, *call.args)
    if str(node.target) == RECURRENCE:
        _tape(body, node, call)
    elif node in body.tapes:
        call.args = (*call.args, body.tapes[node])
    signature = signature_of(node, body.joint)
    assert signature is not None
    final, count = signature.final, len(body.joint.info[node])
    results = [body.call(operator.getitem, call, i) for i in range(count - (final is not None))]
    *values, after = results
    if own:
        body.handed_on.append((before, after))
    if final is not None:
        values.insert(final, after)
    return (*values, before)


def _tape(body: Body, node: fx.Node, call: fx.Node) -> None:
    """Where the body runs the backward of the same chunk too, that need not run it again."""
    (tensors, _), state = node.args, body.labels.states[node]
    for other in state.users:
        same = other in body.order and other in body.labels.states and other.args[2] == tensors
        uses = (body.labels.uses[other][2:-1], body.labels.uses[node]) if same else ((), None)
        if uses[0] == uses[1]:
            call.target, call.args = recurrence.recurrence_taped, (*call.args, other.args[5])
            count = len(body.joint.info[node]) - 1
            body.tapes[other] = body.call(operator.getitem, call, count)


def is_final(node: fx.Node, joint: Joint) -> bool:
    """The state that an op ends with, where its chunks hand states on."""
    call = node.args[0] if node.target is operator.getitem else None
    if not isinstance(call, fx.Node) or not carries_state(call.target):
        return False
    signature = signature_of(call, joint)
    return signature is not None and signature.final == node.args[1]


def ends(body: Body, call: Any) -> tuple[Any, Any]:
    """Equal numbers in the chunk that an op's last state comes from."""
    signature = signature_of(call, body.joint)
    assert signature is not None
    up = all(d > 0 for d in signature.carried.values())
    return (body.ints(HI), body.ints(T)) if up else (body.ints(LO), 0)


def step_of(target: Any) -> Callable[..., tuple[Any, ...]]:
    """What a chunk runs in place of an op that has a carried letter."""
    row = lookup(target)
    return STEPS[str(target)] if row is None or row.step is None else row.step
