"""Patterns by data flow in graphs of ATen operators: what a value is made of, who reads it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

CAST = "aten._to_copy.default"
RESHAPES = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
"""Views of the same elements in the same order."""


def is_op(node: Any, *names: str) -> bool:
    """A call of one of these operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and str(node.target) in names


def behind(node: Any, *names: str) -> Any:
    """What ``node`` was made from by these operators alone."""
    while is_op(node, *names):
        node = node.args[0]
    return node


def readers_past(node: fx.Node, *names: str) -> list[fx.Node]:
    """Users; in place of these operators, their users."""
    out = []
    for user in node.users:
        out += readers_past(user, *names) if is_op(user, *names) else [user]
    return out


def uncast(node: Any) -> Any:
    """What a change of dtype was made from."""
    return node.args[0] if is_op(node, CAST) else node


def mul(node: Any, accept: Callable[[Any], object]) -> tuple[Any, Any] | None:
    """``(accepted, other)`` of the two factors of a product."""
    if not is_op(node, "aten.mul.Tensor"):
        return None
    a, b = node.args[:2]
    if accept(a):
        return a, b
    return (b, a) if accept(b) else None


@dataclass(frozen=True, slots=True)
class MeanSquare:
    """``mean(x^2, -1) + eps``; ``mean`` and ``total`` are the nodes before and after the sum."""

    x: fx.Node
    eps: int | float
    mean: fx.Node
    total: fx.Node


def mean_square(root: Any, *past: str) -> MeanSquare | None:
    """What ``root`` is the reciprocal square root of, in an RMSNorm that a model writes out.

    Operators ``past`` may stand anywhere between.
    """
    inverse = is_op(root, "aten.pow.Tensor_Scalar") and root.args[1] == -0.5
    if not inverse and not is_op(root, "aten.rsqrt.default"):
        return None
    total = behind(root.args[0], *past)
    added = is_op(total, "aten.add.Tensor", "aten.add.Scalar") and len(total.args) == 2
    if not added or total.kwargs:
        return None
    mean, eps = total.args if isinstance(total.args[0], fx.Node) else total.args[::-1]
    mean = behind(mean, *past)
    if isinstance(eps, fx.Node) or not is_op(mean, "aten.mean.dim") or mean.args[2:3] != (True,):
        return None
    x = _squared(behind(mean.args[0], *past), *past)
    value = info(mean) or mean.meta["val"]
    last = list(mean.args[1]) in ([-1], [len(value.shape) - 1])
    return MeanSquare(x, eps, mean, total) if last and x is not None else None


def _squared(node: Any, *past: str) -> Any:
    power = is_op(node, "aten.pow.Tensor_Scalar") and node.args[1] == 2
    if power or is_op(node, "aten.square.default"):
        return behind(node.args[0], *past)
    if is_op(node, "aten.mul.Tensor"):
        a, b = (behind(x, *past) for x in node.args)
        return a if a is b else None
    return None


def info(node: Any) -> Any:
    """Shape and dtype of a value of a body."""
    return node.meta.get("info") if isinstance(node, fx.Node) else None


def before(node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A call before ``node``."""
    with node.graph.inserting_before(node):
        return node.graph.call_function(target, args)


def item(node: fx.Node, source: fx.Node, index: int) -> fx.Node:
    """An element of the tuple ``source``, taken before ``node``."""
    return before(node, operator.getitem, source, index)


def swap(old: fx.Node, new: fx.Node) -> None:
    """Let everything that takes ``old`` take ``new``."""
    new.meta.update({k: v for k, v in old.meta.items() if k == "info"})
    old.replace_all_uses_with(new)
