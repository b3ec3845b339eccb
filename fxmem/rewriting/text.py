"""What passes rewrite, as lines of text: one per node, to compare, to count and to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem.frontend.joint import Joint
from fxmem.program.steps import Loop, Mask, Program, Straight

Subject: TypeAlias = fx.GraphModule | Joint | fx.Graph | Program
"""A captured graph, a joint graph, the body of a loop, a program."""


def lines(subject: Subject) -> list[str]:
    """Its nodes in order; of a program its steps, each with the nodes of its body."""
    if isinstance(subject, fx.Graph):
        return [line(n) for n in subject.nodes]
    if not isinstance(subject, Program):
        return lines(subject.graph)
    out = [_head(subject)]
    for step in (*subject.masks, *subject.steps):
        out.append(_head(step))
        if isinstance(step, (Loop, Mask, Straight)):
            out += [f"    {one}" for one in lines(step.module.graph)]
    return out


def _head(part: Any) -> str:
    """Names and shapes, without bodies."""
    hidden = ("module", "steps", "masks", "compiled", "barriers")
    known = {f.name: getattr(part, f.name) for f in fields(part) if f.name not in hidden}
    compiled = " compiled" if getattr(part, "compiled", None) else ""
    return f"{type(part).__name__} {known}{compiled}"


def line(node: fx.Node) -> str:
    """``name = function(arguments): value``."""
    given = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    made = describe(value(node) if value(node) is not None else node.meta.get("info"))
    return f"{node.name} = {node.op} {_target(node.target)}({', '.join(given)}): {made}"


def _target(target: Any) -> str:
    if isinstance(target, (str, _compat.OpOverload)) or not hasattr(target, "__qualname__"):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"


def value(node: fx.Node) -> Any:
    """The recorded value of a node of a captured or joint graph."""
    return node.meta.get("val", node.meta.get("example_value"))


def describe(value: Any) -> str:
    """Type, sizes and device of a tensor, of each one of a tuple."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} [{', '.join(map(describe, value.shape))}] on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(v) for v in value)})"
    return _printed(value.node.expr) if isinstance(value, torch.SymInt) else str(value)


@lru_cache(maxsize=65536)
def _printed(size: sympy.Expr) -> str:
    """Long sizes, as lengths rounded up to blocks, take longer to print than an op to trace."""
    return str(size)


def changed(before: Sequence[str], after: Sequence[str]) -> int:
    """Lines of nodes that are new, gone or changed: a changed one counts once."""
    names = [line.partition(" = ")[0] for line in {*before} ^ {*after}]
    return len(set(names))
