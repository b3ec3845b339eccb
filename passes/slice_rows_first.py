"""Slice rows first: ``linear(x)[:, a:b]`` becomes ``linear(x[:, a:b])``.

Objectives drop the last row of the logits after the head has made them. Sliced logits of several
sequences are not contiguous, so that what follows copies them, a vocabulary wide; a slice of the
hidden states is small. Rows of a product do not depend on each other, and what stands between
product and slice (a change of dtype, a temperature, a softcap) works entry by entry. Where zeros or
other rows take the place of those that are dropped, it is a shift, which streams as it is.
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
from fxmem.frontend.capture import contexts_of, is_size, is_tensor, value_of
from fxmem.rewriting.pipeline import Edit, LocalPass, call_before

_POINTWISE = frozenset((operator.mul, operator.truediv, torch.mul, torch.div, torch.tanh))
_METHODS = frozenset(("float", "double", "to", "mul", "div", "tanh", "contiguous"))


@dataclass(frozen=True, slots=True)
class SliceRowsFirst(LocalPass[fx.GraphModule]):
    """Rewrite slices whose only source is a linear layer, directly or through pointwise ops."""

    name: str = "slice_rows_first"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        for node in list(gm.graph.nodes):
            chain = _chain(node) if slices_rows(node) and not _is_shift(node) else None
            if chain:
                yield partial(_move, gm, node, chain)


def slices_rows(node: fx.Node) -> bool:
    """``x[:, a:b]`` and the like: slices of step 1, the last dimension whole."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    source, index = node.args
    value = value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(index, tuple):
        return False
    if any(not (i is Ellipsis or isinstance(i, slice)) for i in index):
        return False
    cut = [i for i in index if i is not Ellipsis]
    reaches_last = len(cut) == value.dim() or (Ellipsis in index and index[-1] is not Ellipsis)
    whole = not reaches_last or cut[-1] == slice(None)
    return whole and all(i.step in (None, 1) for i in cut)


def _is_shift(node: fx.Node) -> bool:
    """Whatever reads the slice is as long as what was sliced."""
    source: Any = node.args[0]
    return all(is_tensor(u) and _shape(u) == _shape(source) for u in node.users)


def _shape(node: fx.Node) -> list[Any]:
    return [size(s) for s in value_of(node).shape]


def _chain(node: fx.Node) -> list[fx.Node]:
    """From the linear layer to what ``node`` slices; empty where something else reads one of them,
    the source is not a linear layer, or the slice's bounds are not known before it.
    """
    found: list[fx.Node] = []
    if not all(map(_is_input_size, node.all_input_nodes[1:])):
        return found
    at: Any = node.args[0]
    while isinstance(at, fx.Node) and len(at.users) == 1 and at.args:
        found.insert(0, at)
        if at.target is F.linear:
            return found if value_of(at.args[0]).dim() == value_of(at).dim() else []
        if not _entry_by_entry(at):
            return []
        at = at.args[0]
    return []


def _is_input_size(node: fx.Node) -> bool:
    """A number made of sizes of inputs, so that it may be made anywhere."""
    return is_size(value_of(node)) and all(
        a.op == "placeholder" or _is_input_size(a) for a in node.all_input_nodes
    )


def _earlier(index: Any, before: fx.Node) -> Any:
    """``index`` with its sizes made before a node."""
    made: dict[fx.Node, fx.Node] = {}

    def again(node: fx.Node) -> fx.Node:
        if not isinstance(node, fx.Node) or node.op == "placeholder":
            return node
        if node not in made:
            for a in node.all_input_nodes:
                again(a)
            with before.graph.inserting_before(before):
                made[node] = before.graph.node_copy(node, again)
        return made[node]

    return fx.map_arg(index, again)


def _entry_by_entry(node: fx.Node) -> bool:
    """One tensor operand, the first; the rest are numbers or dtypes."""
    if node.target not in (_METHODS if node.op == "call_method" else _POINTWISE):
        return False
    rest = (*node.args[1:], *node.kwargs.values())
    plain = all(isinstance(a, (int, float, bool, torch.dtype)) for a in rest)
    return plain and isinstance(node.args[0], fx.Node)


def _move(gm: fx.GraphModule, node: fx.Node, chain: list[fx.Node]) -> None:
    """Every step again on the slice, where it stands: autocast may end before ``node``."""
    contexts, _ = contexts_of(gm)
    source = (chain[0].args[0], _earlier(node.args[1], chain[0]))
    now = call_before(chain[0], node.target, source, like=node, context=contexts[node])
    for one in chain:
        rest = (now, *one.args[1:])
        now = call_before(one, one.target, rest, one.kwargs, like=one, context=contexts[one])
    node.replace_all_uses_with(now)
    gm.graph.erase_node(node)
    for one in reversed(chain):
        gm.graph.erase_node(one)
