"""Ignored rows never reach the LM head: how a loss region runs on its valid tokens alone.

A loss region is *packable* if every token whose label is ignored contributes exactly zero to
everything the region returns. That is proved on the joint graph: rows of a token loss and of its
backward are zero where the label is ignored, and stay zero through ops that are linear in them;
every reduction over tokens must read such a value. The region's program then runs on the valid
tokens as one row of a batch, with the same bodies, and the gradient of its states is scattered
back into zeros.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmem.axes.signature import TensorInfo
from fxmem.axes.sizes import Size, T, divide, has_axis, product, same
from fxmem.frontend.joint import Joint
from fxmem.rules import lookup
from fxmem.rules.arithmetic import POINTWISE
from fxmem.rules.movement import ROWS as MOVEMENT
from fxmem.streaming.labels import Kind, analyse

WORTHWHILE = 0.9
"""Rows are packed when fewer than this part of them is valid."""

_KEEP_ZERO = frozenset(
    {
        "aten.mul.Scalar",
        "aten.div.Tensor",
        "aten.div.Scalar",
        "aten.neg.default",
        "aten._to_copy.default",
    }
)


@dataclass(frozen=True, slots=True)
class Packing:
    """Position of the labels, their ignored value, the sizes that are 1 in the packed row, and
    which inputs and outputs carry tokens.
    """

    labels: int
    ignore: int
    batch: tuple[str, ...]
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]


def packing(joint: Joint) -> Packing | None:
    """How to pack the region, or ``None`` where ignored rows may matter or nothing is ignored."""
    targets = {
        (_source(n.args[1 if "backward" not in str(n.target) else 2]), n.args[-1])
        for n in joint.graph.nodes
        if str(n.target) in ("fxmem.token_nll.default", "fxmem.token_nll_backward.default")
    }
    if len(targets) != 1:
        return None
    label, ignore = next(iter(targets))
    if label not in joint.inputs or not isinstance(ignore, int):
        return None
    tokens = product(joint.info[label].shape)
    batch = divide(tokens, T)
    if batch is None or has_axis(batch) or not _regular(joint, batch):
        return None
    if not _token_local(joint) or not _zero_where_ignored(joint, label):
        return None
    wanted = [*joint.outputs, *joint.grads]
    return Packing(
        joint.inputs.index(label), ignore, tuple(sorted(map(str, batch.free_symbols))),
        tuple(_carries(joint.info[n]) for n in joint.inputs),
        tuple(isinstance(n, fx.Node) and _carries(joint.info[n]) for n in wanted),
    )  # fmt: skip


def _source(node: Any) -> Any:
    """The value behind views that keep the order of elements."""
    while isinstance(node, fx.Node) and "view" in str(node.target) and node.op == "call_function":
        node = node.args[0]
    return node


def _carries(info: Any) -> bool:
    return isinstance(info, TensorInfo) and any(has_axis(d) for d in info.shape)


def _regular(joint: Joint, batch: Size) -> bool:
    """Shapes hold ``B, T`` or ``B T`` once, inputs at the front; no size is a factor."""
    symbols = batch.free_symbols | {T}
    for node, info in joint.info.items():
        for one in info if isinstance(info, tuple) else (info,):
            if not isinstance(one, TensorInfo) or not any(
                d.free_symbols & symbols for d in one.shape
            ):
                continue
            at = [i for i, d in enumerate(one.shape) if d.free_symbols & symbols]
            adjacent = at == list(range(at[0], at[0] + len(at))) and len(at) <= 2
            if not adjacent or not same(product(one.shape[i] for i in at), product((batch, T))):
                return False
            front = at[0] == 0 or (at == [1] and one.shape[0] == 1)
            if node in joint.inputs and not front:
                return False
        row = lookup(node.target) if node.op == "call_function" else None
        if isinstance(info, TensorInfo) and row is not None and row.sizes is None:
            scalars = [a for a in node.all_input_nodes if joint.info.get(a) is None]
            if scalars and "slice" not in str(node.target):
                return False
    return True


def _token_local(joint: Joint) -> bool:
    """No token's value depends on another token, but through sums."""
    labels = analyse(joint, causal=True)
    if labels.states:
        return False
    for node, uses in labels.uses.items():
        straight = getattr(labels.label[node], "kind", None) is Kind.STRAIGHT
        target = str(node.target)
        known = any(word in target for word in ("view", "sum", "_to_copy"))
        plain = known or lookup(node.target) is POINTWISE
        for use in uses:
            if not _carries(joint.info[use.operand]):
                continue
            label = labels.label[use.operand]
            if (
                straight
                and label.kind is Kind.STRAIGHT
                and (plain or target == "aten._to_copy.default")
            ):
                continue
            if use.cut is None or use.cut.offset != 0 or use.cut.length != T:
                return False
            if label.kind is Kind.CUT and label.cut != use.cut:
                return False
    return True


def _zero_where_ignored(joint: Joint, label: fx.Node) -> bool:
    """Every output that tokens went into is zero in ignored rows."""
    zero: set[fx.Node] = set()
    for node in joint.graph.nodes:
        if node.op != "call_function" or joint.info[node] is None:
            continue
        target = str(node.target)
        operands = [a for a in node.all_input_nodes if isinstance(joint.info.get(a), TensorInfo)]
        carrying = [a for a in operands if _carries(joint.info[a])]
        if _stays_zero(node, target, label, zero, carrying, operands):
            zero.add(node)
        elif isinstance(joint.info[node], tuple):
            if not all(o is None or _carries(o) for o in joint.info[node]):
                return False
        elif node.target is operator.getitem or _carries(joint.info[node]):
            continue
        elif carrying and zero.isdisjoint(carrying):
            return False  # a reduction that ignored rows may take part in
    grads = [g for g in joint.grads if isinstance(g, fx.Node) and _carries(joint.info[g])]
    outputs = [o for o in joint.outputs if isinstance(o, fx.Node) and _carries(joint.info[o])]
    return not outputs and all(g in zero for g in grads)


def _stays_zero(
    node: fx.Node,
    target: str,
    label: fx.Node,
    zero: set[fx.Node],
    carrying: Sequence[fx.Node],
    operands: Sequence[fx.Node],
) -> bool:
    """Rows of ignored tokens of ``node`` are zero."""
    first: Any = node.args[0] if node.args else None
    if target == "fxmem.token_nll_backward.default":
        return True
    if node.target is operator.getitem:
        loss = str(first.target) == "fxmem.token_nll.default" and node.args[1] == 0
        return loss or first in zero
    if target == "aten.ne.Scalar":
        return _source(first) is label
    if target == "aten.mul.Tensor":
        return any(a in zero for a in carrying)
    if target == "aten.add.Tensor":
        return bool(carrying) and all(a in zero for a in operands)
    if target in _KEEP_ZERO or target in MOVEMENT:
        return first in zero
    return _linear_operand(node) in zero


def _linear_operand(node: fx.Node) -> Any:
    row = lookup(node.target)
    if row is None or row.linear is None:
        return None
    tensors = list(node.args)
    return tensors[row.linear] if row.linear < len(tensors) else None


def pack(plan: Packing, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor] | None:
    """Inputs of valid tokens only, and their positions; ``None`` where it does not pay."""
    labels = tensors[plan.labels].reshape(-1)
    rows = (labels != plan.ignore).nonzero().squeeze(1)
    if not 0 < rows.numel() < WORTHWHILE * labels.numel():
        return None
    out = []
    for t, carries in zip(tensors, plan.inputs, strict=True):
        if not carries:
            out.append(t)
            continue
        chosen = t.reshape(labels.numel(), -1).index_select(0, rows)
        lead = _lead(t, labels)
        shape = (1, rows.numel()) if lead == 2 else (rows.numel(),)
        out.append(chosen.reshape(*shape, *t.shape[lead:]))
    return out, rows


def _lead(t: Tensor, labels: Tensor) -> int:
    """How many leading dimensions hold the tokens."""
    return 1 if t.shape[0] == labels.numel() and (t.dim() == 1 or t.shape[1] != 1) else 2


def unpack(grad: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Rows of ``grad`` put back into zeros of the shape of ``like``."""
    out = torch.zeros(like.shape, dtype=grad.dtype, device=grad.device)
    out.view(-1, grad.numel() // rows.numel()).index_copy_(0, rows, grad.reshape(rows.numel(), -1))
    return out


__all__ = ["Packing", "pack", "packing", "unpack"]
