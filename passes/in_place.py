"""In place: a pointwise op of a chunk body writes into an operand that nobody reads again.

A body is a long line of small elementwise ops. Out of place each of them takes a new block and
leaves a warm one behind; in place it stays in cache and the working set of a chunk shrinks. Legal
where the operand's storage was made in this body, has the result's shape and type, and no alias of
it has a later reader.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem import _compat, runtime

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
}
"""Op -> its in-place form, and the operands that may take the result (sums, products commute)."""


@dataclass(frozen=True, slots=True)
class InPlace:
    """Rewrite the graph of a chunk body where it is legal.

    ``only``: asked with an op and the operand that would take its result; None for all.
    """

    name: str = "in_place"
    only: Callable[[fx.Node, int], bool] | None = None

    def run(self, graph: fx.Graph) -> fx.Graph:
        new = fx.Graph()
        new.output(new.graph_copy(graph, {}))
        order = {n: i for i, n in enumerate(new.nodes)}
        storage = storages(new)
        last: dict[fx.Node, int] = {}
        for n in new.nodes:
            for root in map(storage.get, n.all_input_nodes):
                if root is not None:
                    last[root] = order[n]
        for node in list(new.nodes):
            form = _FORMS.get(str(node.target)) if node.op == "call_function" else None
            if form is None or "alpha" in node.kwargs:
                continue
            for position in form[1]:
                if self.only is not None and not self.only(node, position):
                    continue
                if _writable(node, position, storage, last, order[node]):
                    _rewrite(node, form[0], position)
                    root = storage[node.args[0]]
                    assert root is not None
                    last[root] = max(last[root], last.get(node, order[node]))
                    _merge(storage, node, root)
                    break
        return new


def _writable(
    node: fx.Node, position: int, storage: dict[fx.Node, fx.Node | None],
    last: dict[fx.Node, int], here: int,
) -> bool:  # fmt: skip
    operand = node.args[position]
    if not isinstance(operand, fx.Node) or "info" not in node.meta:
        return False
    root = storage.get(operand)
    if root is None or last[root] > here or operand.meta.get("info") != node.meta["info"]:
        return False
    others = [a for i, a in enumerate(node.args) if i != position and isinstance(a, fx.Node)]
    # an operand of another shape in the same storage could be read after it was written
    if any(storage.get(a) is root for a in others):
        return False
    made = root.meta.get("info")
    return made is not None and _count(made) == _count(node.meta["info"])


def _count(info: Any) -> Any:
    total: Any = 1
    for d in info.shape:
        total = total * d
    return total


def _rewrite(node: fx.Node, target: Any, position: int) -> None:
    if position:
        node.args = (node.args[position], node.args[0], *node.args[2:])
    node.target = target


def _merge(storage: dict[fx.Node, fx.Node | None], node: fx.Node, root: fx.Node) -> None:
    """``node`` and its aliases now live in ``root``."""
    for n, r in storage.items():
        if r is node:
            storage[n] = root


def storages(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """Value -> the node of this body that made its storage; None where it is not the body's own or
    may have aliases that are not followed.
    """
    out: dict[fx.Node, fx.Node | None] = {}
    hidden: set[fx.Node | None] = set()
    for n in graph.nodes:
        if n.op != "call_function":
            out[n] = None
        elif n.target in _ALIASES:
            out[n] = out.get(n.args[0])
        elif isinstance(n.target, _compat.OpOverload):
            returns = n.target._schema.returns
            alias = any(r.alias_info is not None for r in returns)
            if len(returns) == 1 and not n.target._schema.is_mutable:
                out[n] = out.get(n.args[0]) if alias else n
            else:
                out[n] = None
                hidden.update(out.get(a) for a in n.all_input_nodes if alias)
        else:
            out[n] = None
            if n.users:  # a function of ours, which may return its argument
                hidden.update(out.get(a) for a in n.all_input_nodes)
    return {n: None if root in hidden else root for n, root in out.items()}


_ALIASES = (runtime.take, runtime.contiguous, operator.getitem)
