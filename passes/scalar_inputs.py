"""Scalars: numbers that a graph reads from tensors with ``item``.

``torch.compile(dynamic=True)``, or a float argument that has changed between calls, turns a float
into an input tensor of no dimension and a call of ``item``; users write ``mask.sum().item()``.
Arithmetic with a tensor takes the tensor itself, so that the value may change from step to step
without a new capture. Where a number is needed (an epsilon, a norm's degree), an input's is fixed
to its value and Dynamo guards it; one that is computed is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat.data_sizes import by_data
from fxmem.errors import CaptureError
from fxmem.frontend.capture import value_of
from fxmem.frontend.interpret import fake_call
from fxmem.frontend.origin import module_path, name_of, source_line
from fxmem.rewriting.pipeline import Required, call_before, copy_graph

_ARITHMETIC = frozenset(
    (operator.mul, operator.truediv, operator.add, operator.sub, operator.pow, torch.mul,
     torch.div, torch.add, torch.sub, torch.pow)
)  # fmt: skip
_METHODS = frozenset(("mul", "div", "add", "sub", "pow"))
_LIMITS = {torch.sym_max: "min", torch.sym_min: "max"}
"""A limit of a number -> the same as an argument of ``clamp``."""


@dataclass(frozen=True, slots=True)
class ScalarInputs(Required):
    """Rewrite every ``item`` of an input that stands for a float, and arithmetic on such floats."""

    name: str = "scalar_inputs"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if not _numbers(gm):
            return gm
        gm = copy_graph(gm)
        now: dict[fx.Node, Any] = {}
        numbers = _numbers(gm)
        for node in numbers:
            free = _stays_free(node, numbers)
            now[node] = _replacement(node, now) if free else _fixed(node)
        for node in list(now):
            for user in [u for u in node.users if u not in now]:
                new = now[node]
                if isinstance(new, fx.Node):
                    # else two tensors of no dimension would promote to the number's type
                    partner = _partner(user, node)
                    assert partner is not None
                    if value_of(partner).dim() == 0:
                        cast = (new, value_of(partner).dtype)
                        new = call_before(user, "to", cast, like=node)
                _substitute(user, node, new)
        for node in reversed(now):
            gm.graph.erase_node(node)
        return gm


def fix_numbers(gm: fx.GraphModule) -> None:
    """Guard the floats of which :class:`ScalarInputs` makes constants: before any pass runs, since
    a guard rewrites recorded values.

    Raises:
        CaptureError: such a number is the value of a tensor that the graph computes.
    """
    numbers = _numbers(gm)
    for node in numbers:
        for source in node.all_input_nodes:
            if value_of(source) is None:  # an entry that ``tolist`` reads
                source.meta["example_value"] = fake_call(source, False)
        if not _stays_free(node, numbers):
            _fixed(node)


def _fixed(node: fx.Node) -> float:
    if by_data(value_of(node)):
        user = next((u for u in node.users if u.op != "output"), node)
        name = name_of(user.target)
        size = isinstance(value_of(node), torch.SymInt)
        raise CaptureError(
            "a size depends on the values of a tensor" if size
            else f"a number that is read from a tensor is used in `{name}`",
            op=str(node.target), module=module_path(node),
            source=source_line(user) or source_line(node),
            advice="keep all rows: torch.where(mask, x, 0) in place of x[mask]" if size
            else "leave out .item(), or compute it outside the model and pass it in",
        )  # fmt: skip
    return float(value_of(node))


def _numbers(gm: fx.GraphModule) -> list[fx.Node]:
    """``item`` of tensors and arithmetic on such numbers, in order."""
    found: dict[fx.Node, None] = {}
    for n in gm.graph.nodes:
        value = value_of(n)
        number = isinstance(value, (float, torch.SymFloat)) or (
            isinstance(value, torch.SymInt) and by_data(value)
        )
        if not number or n.op == "placeholder":
            continue
        item = n.op == "call_method" and n.target == "item"
        if item or (_combines(n) and all(a in found for a in n.all_input_nodes)):
            found[n] = None
    return list(found)


def _combines(node: fx.Node) -> bool:
    """The node makes a number of numbers, in a way that tensors can follow."""
    if node.target in _LIMITS:
        return sum(isinstance(a, fx.Node) for a in node.args) == 1
    return node.target in _ARITHMETIC or node.target is torch.sym_float


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
        return _read(number)
    args = fx.map_arg(number.args, lambda a: now[a])
    if number.target is torch.sym_float:
        return call_before(number, "to", (args[0], torch.float64), like=number)
    if number.target in _LIMITS:
        tensor, limit = sorted(args, key=lambda a: not isinstance(a, fx.Node))
        given = {_LIMITS[number.target]: limit}
        return call_before(number, "clamp", (tensor,), given, like=number)
    return call_before(number, number.target, args, like=number)


def _read(item: fx.Node) -> fx.Node:
    """The tensor that is read, as one that does not learn and promotes as a number does."""
    (source,) = item.all_input_nodes
    value = value_of(source)
    for wanted, method, args in (
        (value.requires_grad, "detach", ()), (value.dim() > 0, "reshape", ((),)),
        # whole numbers too: a quotient of theirs would have PyTorch's default precision
        (value.dtype != torch.float64, "to", (torch.float64,)),
    ):  # fmt: skip
        if wanted:
            source = call_before(item, method, (source, *args), like=item)
    return source


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
