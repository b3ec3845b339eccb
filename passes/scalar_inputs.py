"""Scalar inputs: Python floats that Dynamo passes in as tensors.

``torch.compile(dynamic=True)``, or a float argument that has changed between calls, turns a float
into an input tensor of no dimension and a call of ``item``. Arithmetic with a tensor takes the
input itself, so that a coefficient may change from step to step without a new capture. Where a
number is needed (an epsilon, a norm's degree), the float is fixed to its value and Dynamo guards
it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmem.capture import value_of
from fxmem.pipeline import call_before, copy_graph

_ARITHMETIC = frozenset(
    (operator.mul, operator.truediv, operator.add, operator.sub, torch.mul, torch.div, torch.add,
     torch.sub)
)  # fmt: skip
_METHODS = frozenset(("mul", "div", "add", "sub"))


@dataclass(frozen=True, slots=True)
class ScalarInputs:
    """Rewrite every ``item`` of an input that stands for a float, and arithmetic on such floats."""

    name: str = "scalar_inputs"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = copy_graph(gm)
        now: dict[fx.Node, Any] = {}
        numbers = _numbers(gm)
        for node in numbers:
            free = _stays_free(node, numbers)
            now[node] = _replacement(node, now) if free else float(value_of(node))
        for node in list(now):
            for user in [u for u in node.users if u not in now]:
                new = now[node]
                if isinstance(new, fx.Node):
                    # else two tensors of no dimension would promote to the number's type
                    partner = _partner(user, node)
                    assert partner is not None
                    cast = (new, value_of(partner).dtype)
                    new = call_before(user, "to", cast, like=node)
                _substitute(user, node, new)
        for node in reversed(now):
            gm.graph.erase_node(node)
        return gm


def fix_numbers(gm: fx.GraphModule) -> None:
    """Guard the floats of which :class:`ScalarInputs` makes constants: before any pass runs, since
    a guard rewrites recorded values.
    """
    numbers = _numbers(gm)
    for node in numbers:
        if not _stays_free(node, numbers):
            float(value_of(node))


def _numbers(gm: fx.GraphModule) -> list[fx.Node]:
    """``item`` of inputs and arithmetic on such numbers, in order."""
    found: dict[fx.Node, None] = {}
    for n in gm.graph.nodes:
        if not isinstance(value_of(n), (float, torch.SymFloat)) or n.op == "placeholder":
            continue
        sources = n.all_input_nodes
        item = n.op == "call_method" and n.target == "item" and sources[0].op == "placeholder"
        if item or (n.target in _ARITHMETIC and all(a in found for a in sources)):
            found[n] = None
    return list(found)


def _stays_free(number: fx.Node, numbers: Sequence[fx.Node]) -> bool:
    """Every use is arithmetic with a tensor of floats, or makes a number of which that is true."""
    for user in number.users:
        inner = user in numbers
        if not (_stays_free(user, numbers) if inner else _partner(user, number)):
            return False
    return True


def _replacement(number: fx.Node, now: dict[fx.Node, Any]) -> Any:
    """The number as a tensor of no dimension, in Python's own precision."""
    if number.target == "item":
        return number.args[0]
    args = fx.map_arg(number.args, lambda a: now[a])
    return call_before(number, number.target, args, like=number)


def _partner(user: fx.Node, number: fx.Node) -> fx.Node | None:
    """The tensor of floats that ``user`` combines with ``number`` entry by entry."""
    known = _METHODS if user.op == "call_method" else _ARITHMETIC
    if user.target not in known or user.kwargs or len(user.args) != 2:
        return None
    others = [a for a in user.args if a is not number]
    if len(others) != 1 or (user.op == "call_method" and user.args[0] is number):
        return None
    (other,) = others
    value = value_of(other) if isinstance(other, fx.Node) else None
    usable = isinstance(value, Tensor) and value.is_floating_point()
    return other if usable else None


def _substitute(user: fx.Node, old: fx.Node, new: Any) -> None:
    def swap(a: fx.Node) -> Any:
        return new if a is old else a

    user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), swap)
