"""Windows over earlier tokens: ``pad(x, (2, 0)).unfold(-1, 3, 1)``, as short dynamic convolutions
read them. Entry ``i`` of such a window is the sequence shifted by so many rows, which streams.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxmem.axes.sizes import size
from fxmem.frontend.capture import contexts_of, is_tensor, value_of
from fxmem.kernels import carried  # noqa: F401  (registers the ops)
from fxmem.rewriting.pipeline import Edit, LocalPass, call_before

LIMIT = 16
"""Rows of a window; each is a shift of its own."""
_NAMES = ("dimension", "size", "step")


@dataclass(frozen=True, slots=True)
class Windows(LocalPass[fx.GraphModule]):
    """Rewrite windows of what was padded with one row less than they have, in front."""

    name: str = "windows"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        for node in list(gm.graph.nodes):
            found = _read(node) if node.op == "call_method" and node.target == "unfold" else None
            if found is not None:
                yield partial(_rewrite, gm, node, *found)


def _read(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What was padded, the axis, and the rows of a window."""
    given = {**dict(zip(_NAMES, node.args[1:], strict=False)), **node.kwargs}
    dim, rows, step = (given.get(n) for n in _NAMES)
    if not isinstance(dim, int) or not isinstance(rows, int) or step != 1 or not 1 < rows <= LIMIT:
        return None
    padded: Any = node.args[0]
    found, dim = zeros_in_front(padded), dim % value_of(padded).dim()
    return (found[0], dim, rows) if found is not None and found[1:] == (dim, rows - 1) else None


def windows(x: Tensor, dim: int, rows: int) -> Tensor:
    """``x`` with ``rows - 1`` zeros in front along ``dim``, and the windows of that."""
    shifted = [torch.ops.fxmem.delay(x, dim, i)[0] for i in range(rows - 1, 0, -1)]
    return torch.stack([*shifted, x], -1)


def zeros_in_front(node: Any) -> tuple[fx.Node, int, int] | None:
    """``(source, dim, rows)`` of a value that is ``source`` behind rows of zeros."""
    while _is_whole_slice(node):
        node = node.args[0]
    name = getattr(node.target, "__name__", "")
    found = None
    if name == F.pad.__name__ and not node.kwargs:
        found = _padded(node)
    elif node.target in (torch.cat, torch.concat, torch.concatenate):
        found = _joined(node)
    streams = found is not None and bool(size(value_of(found[0]).shape[found[1]]).free_symbols)
    return found if streams else None


def _is_whole_slice(node: fx.Node) -> bool:
    """A slice that leaves nothing out."""
    if node.target is not operator.getitem or not is_tensor(node.args[0]):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    shapes = ([size(s) for s in value_of(n).shape] for n in (node, node.args[0]))
    slices = all(i is Ellipsis or (isinstance(i, slice) and i.step in (None, 1)) for i in index)
    return slices and operator.eq(*shapes)


def _padded(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    rest: tuple[Any, ...] = (None, None, "constant", None)
    source, pads, mode, value = (node.args + rest[len(node.args) :])[:4]
    places = [i for i, p in enumerate(pads) if not isinstance(p, int) or p != 0]
    if mode != "constant" or value or len(places) != 1 or places[0] % 2:
        return None
    rows, dim = pads[places[0]], value_of(node).dim() - 1 - places[0] // 2
    return (source, dim, rows) if isinstance(rows, int) and rows > 0 else None


def _joined(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    parts: Any = node.args[0] if node.args else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(map(is_tensor, parts)):
        return None
    first, source = parts
    dim = int(node.args[1] if len(node.args) > 1 else 0) % value_of(node).dim()
    if not made_of_zeros(first) or value_of(first).dim() != value_of(node).dim():
        return None
    rows = size(value_of(first).shape[dim])
    return (source, dim, int(rows)) if rows.is_Integer and rows > 0 else None


def made_of_zeros(node: fx.Node) -> bool:
    """In any spelling; an input may have such a name, too."""
    name = getattr(node.target, "__name__", node.target)
    return node.op.startswith("call") and name in ("zeros", "zeros_like", "new_zeros")


def _rewrite(gm: fx.GraphModule, node: fx.Node, source: fx.Node, dim: int, rows: int) -> None:
    context = contexts_of(gm)[0][node]
    new = call_before(node, windows, (source, dim, rows), like=node, context=context)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
