"""Patterns by data flow in graphs of ATen operators: what a value is made of, who reads it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

CAST = "aten._to_copy.default"


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


def mul(node: Any, accept: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """``(accepted, other)`` of the two factors of a product."""
    if not is_op(node, "aten.mul.Tensor"):
        return None
    a, b = node.args[:2]
    if accept(a):
        return a, b
    return (b, a) if accept(b) else None


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
