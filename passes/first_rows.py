"""First rows that a model sets itself before a shifted value: ``cat([start, x[:, :-1]], 1)``; and
``roll(x, 1, 1)``, where they are the last ones of the value.

Joined like this, rows move out of their chunks. With zeros in their place it is a shift; which rows
are then the first ones is known from their positions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxmem.axes.sizes import size
from fxmem.frontend.capture import contexts_of, is_tensor, value_of
from fxmem.kernels import carried  # noqa: F401  (registers the ops)
from fxmem.passes.windows import made_of_zeros
from fxmem.rewriting.pipeline import Edit, LocalPass, call_before

LIMIT = 8
"""Rows that are written one by one."""
_JOINS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True, slots=True)
class FirstRows(LocalPass[fx.GraphModule]):
    """Rewrite joins of a few rows and all but the last ones of a value, and rolls by a few rows."""

    name: str = "first_rows"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        for node in list(gm.graph.nodes):
            if node.target in _JOINS and (found := _read(node)) is not None:
                yield partial(_rewrite, gm, node, shifted, *found)
            elif (turned := _roll(node)) is not None:
                yield partial(_rewrite, gm, node, rolled, *turned)


def shifted(first: Tensor, rest: Tensor, dim: int) -> Tensor:
    """``cat([first, rest], dim)``."""
    out = torch.cat([torch.zeros_like(first), rest], dim)
    at = _positions(out, dim)
    for i in range(first.shape[dim]):
        out = torch.where(at == i, first.narrow(dim, i, 1), out)
    return out


def rolled(x: Tensor, rows: int, dim: int) -> Tensor:
    """``x.roll(rows, dim)``; a row is picked by a sum over all, which chunks add up."""
    length = x.shape[dim]
    if length < abs(rows):
        return x.roll(rows, dim)
    out = torch.ops.fxmem.delay(x, dim, rows)[0]
    at, start = _positions(x, dim), 0 if rows > 0 else length + rows
    for i in range(abs(rows)):
        own = at == (length - rows if rows > 0 else 0) + i
        row = torch.where(own, x, 0.0).sum(dim, keepdim=True).to(x.dtype)
        out = torch.where(at == start + i, row, out)
    return out


def _positions(x: Tensor, dim: int) -> Tensor:
    return torch.arange(x.shape[dim], device=x.device).view(-1, *[1] * (x.dim() - dim - 1))


def _roll(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What is rolled along the one axis that varies, by how many rows, and the axis."""
    if node.target not in (torch.roll, "roll") or len(node.args) < 3 or not is_tensor(node):
        return None
    x: Any
    x, rows, dim = (a[0] if isinstance(a, tuple | list) and len(a) == 1 else a for a in node.args)
    if not isinstance(rows, int) or not isinstance(dim, int) or not 0 < abs(rows) <= LIMIT:
        return None
    dim, value = dim % value_of(node).dim(), value_of(x)
    streams = value.is_floating_point() and size(value.shape[dim]).free_symbols
    return (x, rows, dim) if streams else None


def _read(node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    parts: Any = node.args[0] if node.args else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(map(is_tensor, parts)):
        return None
    first, rest = parts
    out = value_of(node)
    if value_of(first).dim() != out.dim():  # nothing at all, in front of the first rows of a cache
        return None
    dim = int(node.args[1] if len(node.args) > 1 else 0) % out.dim()
    rows, length = size(value_of(first).shape[dim]), size(out.shape[dim])
    if (
        not rows.is_Integer
        or not 0 < rows <= LIMIT
        or not length.free_symbols
        or made_of_zeros(first)
    ):
        return None
    if rest.target is not operator.getitem or not is_tensor(rest.args[0]):
        return None
    index = rest.args[1] if isinstance(rest.args[1], tuple) else (rest.args[1],)
    cuts = [i for i in index if i not in (Ellipsis, slice(None))]
    source = value_of(rest.args[0])
    whole = source.dim() == out.dim() and size(source.shape[dim]) == length
    return (first, rest, dim) if whole and cuts == [slice(None, -int(rows))] else None


def _rewrite(gm: fx.GraphModule, node: fx.Node, function: Any, *args: Any) -> None:
    context = contexts_of(gm)[0][node]
    new = call_before(node, function, args, like=node, context=context)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
