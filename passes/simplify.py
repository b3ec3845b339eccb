"""Simplify: the joint graph without work that changes no bit of its results.

Autograd's formulas are written for any operand. On a known graph some of their steps do nothing
(``x ** 1``, ``detach``), some run on a value after it was broadcast although they could run before,
and a rotated half comes back as two zero-padded copies that are added. Every rule here gives the
same floating-point numbers; the order of no sum changes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxmem.frontend.capture import value_of
from fxmem.frontend.joint import Joint
from fxmem.rewriting.patterns import is_op
from fxmem.rewriting.pipeline import Edit, LocalPass

_SCALAR = {
    "aten.div.Scalar": torch.ops.aten.div.Scalar,
    "aten.mul.Scalar": torch.ops.aten.mul.Scalar,
}
_PRODUCT = "aten.mul.Tensor"


@dataclass(frozen=True, slots=True)
class Simplify(LocalPass[Joint]):
    """Apply the rules in graph order."""

    name: str = "simplify"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        for node in list(joint.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            for rule in (_identity, _scale_before_broadcast, _power_of_two, _joined):
                new = rule(joint, node)
                if new is not None:
                    yield partial(joint.replace, node, new)
                    break
        joint.graph.eliminate_dead_code()


def _identity(joint: Joint, node: fx.Node) -> fx.Node | None:
    """``detach(x)``, ``x ** 1``, ``x[:]`` -> ``x``."""
    target = str(node.target)
    if target in ("aten.slice.Tensor", "aten.slice_backward.default"):
        start, stop, step = _whole(node)
        whole = (start, stop, step) == (0, sys.maxsize, 1)
        return _laid_out(joint, node) if whole else None
    if target in ("aten.detach.default", "aten.alias.default"):
        return _tensor(node.args[0])
    if target == "aten.pow.Tensor_Scalar" and node.args[1] == 1:
        source = _tensor(node.args[0])
        if source is not None and joint.info[source] == joint.info[node]:
            return source
    return None


def _laid_out(joint: Joint, node: fx.Node) -> fx.Node:
    """The operand, dense where the result is: the gradient of a slice is, a broadcast one is not,
    and a view may follow.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if tuple(value_of(source).stride()) == tuple(value_of(node).stride()):
        return source
    kwargs = {"memory_format": torch.contiguous_format}
    return joint.call(node, torch.ops.aten.clone.default, (source,), kwargs, like=node)


def _scale_before_broadcast(joint: Joint, node: fx.Node) -> fx.Node | None:
    """``expand(x) / c`` -> ``expand(x / c)``."""
    expand = node.args[0]
    if not is_op(node, *_SCALAR) or not is_op(expand, "aten.expand.default"):
        return None
    assert isinstance(expand, fx.Node)
    if len(expand.users) > 1:
        return None
    small = expand.args[0]
    assert isinstance(small, fx.Node)
    scaled = joint.call(node, _SCALAR[str(node.target)], (small, node.args[1]), like=small)
    return joint.call(node, expand.target, (scaled, *expand.args[1:]), like=node)


def _power_of_two(joint: Joint, node: fx.Node) -> fx.Node | None:
    """``expand(x) * (y * 2)`` -> ``expand(x * 2) * y``: exact, and ``x`` is the smaller one."""
    if str(node.target) != _PRODUCT:
        return None
    a, b = node.args[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    for wide, scaled in ((a, b), (b, a)):
        if str(wide.target) != "aten.expand.default" or str(scaled.target) != "aten.mul.Scalar":
            continue
        factor = scaled.args[1]
        if not isinstance(factor, (int, float)) or math.frexp(abs(factor))[0] != 0.5:
            continue
        if joint.info[scaled.args[0]] != joint.info[scaled]:
            continue
        small = wide.args[0]
        first = joint.call(node, torch.ops.aten.mul.Scalar, (small, factor), like=small)
        again = joint.call(node, wide.target, (first, *wide.args[1:]), like=wide)
        return joint.call(node, node.target, (again, scaled.args[0]), like=node)
    return None


def _joined(joint: Joint, node: fx.Node) -> fx.Node | None:
    """The sum of two gradients of neighbouring slices -> their concatenation."""
    if str(node.target) != "aten.add.Tensor" or node.kwargs:
        return None
    parts = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if len(parts) != 2 or any(str(p.target) != "aten.slice_backward.default" for p in parts):
        return None
    places = [_slice(joint, p) for p in parts]
    if any(p is None or p[0] != places[0][0] for p in places):
        return None
    (dim, a, b, size), (_, c, d, _) = places
    ordered = [parts[0].args[0], parts[1].args[0]]
    if (a, b, d) == (0, c, size):
        return joint.call(node, torch.ops.aten.cat.default, (ordered, dim), like=node)
    if (c, d, b) == (0, a, size):
        return joint.call(node, torch.ops.aten.cat.default, (ordered[::-1], dim), like=node)
    return None


def _slice(joint: Joint, node: fx.Node) -> Any:
    """``(dim, start, stop, size)`` of a slice with fixed numbers and step 1, else None."""
    _, shape, dim, start, stop, step = node.args
    size = shape[dim]
    if step != 1 or not all(isinstance(x, int) for x in (size, start, stop)):
        return None
    whole = range(size)[start:stop]
    return dim % len(shape), whole.start, whole.stop, size


def _whole(node: fx.Node) -> tuple[Any, Any, Any]:
    """Start, stop and step of a slice or of its gradient, defaults filled in."""
    skipped = 3 if str(node.target) == "aten.slice_backward.default" else 2
    start, stop, step = (*node.args[skipped:], None, None, None)[:3]
    return start or 0, sys.maxsize if stop is None else stop, step or 1


def _tensor(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None
