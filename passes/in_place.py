"""In place: a pointwise op of a chunk body writes into an operand that nobody reads again.

A body is a long line of small elementwise ops. Out of place each of them takes a new block and
leaves a warm one behind; in place it stays in cache and the working set of a chunk shrinks. Legal
where the operand's storage was made in this body, has the result's shape and type, and no alias of
it has a later reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxmem.program import body_ops
from fxmem.rewriting.aliases import storages
from fxmem.rewriting.pipeline import Edit, LocalPass

aten = torch.ops.aten

_FORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "aten.add.Tensor": (aten.add_.Tensor, (0, 1)),
    "aten.mul.Tensor": (aten.mul_.Tensor, (0, 1)),
    "aten.sub.Tensor": (aten.sub_.Tensor, (0,)),
    "aten.div.Tensor": (aten.div_.Tensor, (0,)),
    "aten.add.Scalar": (aten.add_.Scalar, (0,)),
    "aten.mul.Scalar": (aten.mul_.Scalar, (0,)),
    "aten.div.Scalar": (aten.div_.Scalar, (0,)),
    "aten.neg.default": (aten.neg_.default, (0,)),
    "aten.exp.default": (aten.exp_.default, (0,)),
    "aten.rsqrt.default": (aten.rsqrt_.default, (0,)),
    "aten.silu.default": (aten.silu_.default, (0,)),
    "aten.sigmoid.default": (aten.sigmoid_.default, (0,)),
    "aten.tanh.default": (aten.tanh_.default, (0,)),
    "aten.relu.default": (aten.relu_.default, (0,)),
    "aten.gelu.default": (aten.gelu_.default, (0,)),
    "aten.pow.Tensor_Scalar": (aten.pow_.Scalar, (0,)),
    "aten.masked_fill.Scalar": (aten.masked_fill_.Scalar, (0,)),
    "aten.scatter_add.default": (aten.scatter_add_.default, (0,)),
    "aten.scatter.src": (aten.scatter_.src, (0,)),
    "aten.scatter.value": (aten.scatter_.value, (0,)),
    "aten.index_add.default": (aten.index_add_.default, (0,)),
    "aten._softmax_backward_data.default": (body_ops.softmax_backward_, (0,)),
    "aten._log_softmax_backward_data.default": (body_ops.log_softmax_backward_, (0,)),
}
"""Op -> its in-place form, and the operands that may take the result (sums, products commute)."""


@dataclass(frozen=True, slots=True)
class InPlace(LocalPass[fx.Graph]):
    """Rewrite the graph of a chunk body where it is legal.

    ``only``: asked with an op and the operand that would take its result; None for all.
    """

    name: str = "in_place"
    only: Callable[[fx.Node, int], bool] | None = None

    def edits(self, graph: fx.Graph) -> Iterator[Edit]:
        memory = _Memory.of(graph)
        for node in list(graph.nodes):
            for position in _positions(node):
                asked = self.only is None or self.only(node, position)
                if asked and memory.writable(node, position):
                    yield partial(_rewrite, memory, node, position)
                    break


def overwritable(node: fx.Node) -> list[fx.Node]:
    """Operands in whose place this operator could write its result."""
    operands = (node.args[i] for i in _positions(node))
    return [n for n in operands if isinstance(n, fx.Node)]


def _positions(node: fx.Node) -> tuple[int, ...]:
    form = _FORMS.get(str(node.target)) if node.op == "call_function" else None
    if form is None or "alpha" in node.kwargs or not _by_rows(node):
        return ()
    return form[1]


@dataclass(frozen=True, slots=True)
class _Memory:
    """Who made the storage of each value, and where each storage is read last."""

    order: dict[fx.Node, int]
    storage: dict[fx.Node, fx.Node | None]
    last: dict[fx.Node, int]

    @classmethod
    def of(cls, graph: fx.Graph) -> _Memory:
        order = {n: i for i, n in enumerate(graph.nodes)}
        storage = storages(graph)
        last: dict[fx.Node, int] = {}
        for n in graph.nodes:
            for root in map(storage.get, n.all_input_nodes):
                if root is not None:
                    last[root] = order[n]
        return cls(order, storage, last)

    def writable(self, node: fx.Node, position: int) -> bool:
        """The result may lie where its operand at ``position`` does."""
        operand = node.args[position]
        if not isinstance(operand, fx.Node) or "info" not in node.meta:
            return False
        root, info = self.storage.get(operand), operand.meta.get("info")
        if root is None or self.last[root] > self.order[node] or info != node.meta["info"]:
            return False
        others = [a for i, a in enumerate(node.args) if i != position and isinstance(a, fx.Node)]
        # an operand of another shape in the same storage could be read after it was written
        if any(self.storage.get(a) is root for a in others):
            return False
        made = root.meta.get("info")
        return made is not None and _count(made) == _count(node.meta["info"])

    def merge(self, node: fx.Node, root: fx.Node) -> None:
        """``node`` and its aliases now live in ``root``."""
        self.last[root] = max(self.last[root], self.last.get(node, self.order[node]))
        for n, r in self.storage.items():
            if r is node:
                self.storage[n] = root


def _by_rows(node: fx.Node) -> bool:
    """Where the op reads more than one element for another, that is along the last dimension."""
    if "softmax" not in str(node.target):
        return True
    return node.args[2] % len(node.meta["info"].shape) == len(node.meta["info"].shape) - 1


def _count(info: Any) -> Any:
    return math.prod(info.shape, start=1)


def _rewrite(memory: _Memory, node: fx.Node, position: int) -> None:
    root = memory.storage[node.args[position]]
    assert root is not None
    if position:
        node.args = (node.args[position], node.args[0], *node.args[2:])
    node.target = _FORMS[str(node.target)][0]
    memory.merge(node, root)
