"""What an op costs: floating-point operations and bytes moved, from its shapes.

Products and convolutions are counted by torch's own formulas (:mod:`torch.utils.flop_counter`),
attention by ours, since its op is ours. Everything else is taken to be bound by memory: it costs
the bytes that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxmem._compat import graph as _compat
from fxmem.axes.signature import Call, Order, TensorInfo
from fxmem.axes.sizes import Size, evaluate, evaluate_shape, with_chunks
from fxmem.frontend.joint import Joint
from fxmem.rules.movement import ROWS as MOVEMENT
from fxmem.streaming.labels import call_of, signature_of

BACKWARD_PRODUCTS = 5
"""Products of queries x keys that attention's backward makes; its forward makes two."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second: floating-point operations and bytes of memory traffic."""

    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of some ops together: floating-point operations, and bytes that the other ones move."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rates: Rates) -> float:
        """Time at these rates."""
        return self.flops / rates.flops + self.bytes / rates.bytes


def cost_of(joint: Joint, nodes: Iterable[fx.Node], sizes: Mapping[str, int]) -> Cost:
    """Of running these nodes once over the whole length."""
    sizes = with_chunks(sizes, sizes.get("T", 1))
    total = Cost()
    for node in nodes:
        if node.op == "call_function" and joint.info[node] is not None:
            total += _of(node, joint, sizes)
    return total


def _of(node: fx.Node, joint: Joint, sizes: Mapping[str, int]) -> Cost:
    if str(node.target) in MOVEMENT or not isinstance(node.target, _compat.OpOverload):
        return Cost()
    call, signature = call_of(node, joint), signature_of(node, joint)
    if signature is not None and signature.order is not None:
        return Cost(_attention(call, signature.order, bool(signature.prefix), sizes))
    formula = flop_registry.get(node.target.overloadpacket)
    if formula is not None:
        args, kwargs, outs = _compat.tree_map_only(
            (TensorInfo, Size), lambda v: _value(v, sizes), (call.args, call.kwargs, call.outs)
        )
        return Cost(float(formula(*args, **kwargs, out_val=outs[0] if len(outs) == 1 else outs)))
    return Cost(0.0, float(sum(_bytes(t, sizes) for t in (*call.tensors, *call.outs) if t)))


def _attention(call: Call, order: Order, hides: bool, sizes: Mapping[str, int]) -> float:
    """One with a mask is taken to be causal, which skips half of its products."""
    operands = [call.tensors[i] for i in (order.rows, *order.keys)]
    query, key, value = (evaluate_shape(t.shape, sizes) for t in operands)
    batch, heads, queries, width = query
    pairs = batch * heads * queries * key[2] / (2 if hides or order.mask is not None else 1)
    products = BACKWARD_PRODUCTS if order.sums else 2
    return pairs * products * (width + value[3])


def _value(value: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(value, TensorInfo):
        return torch.Size(evaluate_shape(value.shape, sizes))
    return evaluate(value, sizes)


def _bytes(info: TensorInfo, sizes: Mapping[str, int]) -> int:
    return torch.Size(evaluate_shape(info.shape, sizes)).numel() * info.dtype.itemsize
