"""Positional arguments: calls of PyTorch's functions in one spelling, whatever the user wrote.

A captured call keeps the words of the user: ``F.dropout(input=x)``, ``torch.cat(parts, axis=-1)``.
Passes behind this one read arguments by position. NumPy's names (``axis``, ``keepdims``), which
PyTorch takes as well, become PyTorch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat import graph as _compat
from fxmem.rewriting.pipeline import Required, copy_graph

_NUMPY = {"axis": "dim", "keepdims": "keepdim", "a": "input", "x": "input", "x1": "input",
          "x2": "other"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PositionalArguments(Required):
    """Rewrite every call with keywords of a function or method of PyTorch."""

    name: str = "positional_arguments"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if not any(_spelled(n) is not None for n in gm.graph.nodes):
            return gm
        gm = copy_graph(gm)
        for node in gm.graph.nodes:
            found = _spelled(node)
            if found is not None:
                node.args, node.kwargs = found
        gm.recompile()
        return gm


def _spelled(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments and keywords in the one spelling; None where that is how they stand."""
    if not node.kwargs or node.op not in ("call_function", "call_method"):
        return None
    for names in _signatures(node, len(node.args)):
        kwargs = {k if k in names else _NUMPY.get(k, k): v for k, v in node.kwargs.items()}
        if len(kwargs) == len(node.kwargs) and kwargs.keys() <= set(names):
            args = list(node.args)
            positional = [n for n, by_position in names.items() if by_position]
            for name in positional[len(args) :]:
                if name not in kwargs:
                    break
                args.append(kwargs.pop(name))
            changed = kwargs.keys() != node.kwargs.keys()
            return (tuple(args), kwargs) if changed else None
    return None


def _signatures(node: fx.Node, given: int) -> list[dict[str, bool]]:
    """Names of the parameters, by position or not, of each form that takes ``given`` of them."""
    if node.op == "call_method":
        known = hasattr(Tensor, str(node.target))
        forms = _overloads(str(node.target)) if known else []
    elif isinstance(node.target, _compat.OpOverload):
        forms = [_compat.schema_names(node.target)]
    elif inspect.isfunction(node.target) and _is_torch(node.target):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(node.target).parameters.values()
        forms = [{p.name: p.kind in kinds for p in parameters}]
    elif inspect.isbuiltin(node.target) and _is_torch(node.target):
        forms = _overloads(node.target.__name__)
    else:
        forms = []
    return [f for f in forms if given <= sum(f.values())]


def _is_torch(function: Any) -> bool:
    """A public function of PyTorch, not of a library on top of it."""
    name = getattr(function, "__name__", "")
    owners = (torch, torch.nn.functional, torch.special, torch.linalg, torch.fft)
    return any(getattr(o, name, None) is function for o in owners)


@lru_cache(maxsize=1024)
def _overloads(name: str) -> list[dict[str, bool]]:
    packet = getattr(torch.ops.aten, name, None)
    names: Collection[str] = packet.overloads() if packet is not None else ()
    forms = [_compat.schema_names(getattr(packet, n)) for n in names]
    # a tensor is called input in functions
    return [{("input" if n == "self" else n): p for n, p in f.items()} for f in forms]


__all__ = ["PositionalArguments"]
