"""Which subgraphs of a chunk body a kernel computes, found by data flow.

A matcher looks at one node and what it is made of. It returns a :class:`Match`: the operator that
the subgraph amounts to, with its axis signature, and how to put a call in its place. Names of
modules, models or variables play no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem.axes.signature import Signature
from fxmem.kernels import calls
from fxmem.kernels.kernel import signature
from fxmem.rewriting.patterns import before, info, is_op, item, mul, swap

_ACTIVATIONS = {"aten.silu.default": "silu", "aten.gelu.default": "gelu"}
_SLOPES = {
    "aten.silu_backward.default": "aten.silu.default",
    "aten.gelu_backward.default": "aten.gelu.default",
}


@dataclass(frozen=True, slots=True)
class Match:
    """``replace()`` rewrites the graph; ``dtype`` is that of the main operands, ``at`` the node by
    which the subgraph is known where it may be left as it is.
    """

    kernel: str
    op: str
    signature: Signature
    dtype: torch.dtype
    replace: Callable[[], None]
    at: fx.Node | None = None


def gated(node: fx.Node) -> Match | None:
    """``act(gate) * up``, the activation's value as it is."""
    found = mul(node, lambda a: is_op(a, *_ACTIVATIONS))
    if found is None:
        return None
    active, up = found
    act = _activation(active)
    gate = active.args[0]
    if info(up) != info(node) or info(gate) != info(node):
        return None

    def replace() -> None:
        swap(node, before(node, calls.gated, gate, up, act))

    sig = signature("n i, n i -> n i")
    return Match("gated", "aten.mul.Tensor", sig, info(node).dtype, replace, active)


def _activation(active: fx.Node) -> str:
    tanh = active.kwargs.get("approximate") == "tanh"
    return "gelu_tanh" if tanh else _ACTIVATIONS[str(active.target)]


def gated_backward(node: fx.Node) -> Match | None:
    """``act_backward(dout * up, gate)`` with ``dout * act(gate)`` beside it."""
    if not is_op(node, *_SLOPES):
        return None
    product, gate = node.args[:2]
    forward = _SLOPES[str(node.target)]
    actives = [u for u in gate.users if is_op(u, forward) and u.kwargs == node.kwargs]
    if not is_op(product, "aten.mul.Tensor") or len(product.users) != 1 or not actives:
        return None
    act = _activation(actives[0])
    for dout, up in (product.args[:2], product.args[1::-1]):
        for other in actives[0].users:
            if other is not product and is_op(other, "aten.mul.Tensor") and dout in other.args:
                first = min(other, product)

                def replace(
                    dout: Any = dout, up: Any = up, other: Any = other, first: Any = first
                ) -> None:
                    made = before(first, calls.gated_backward, dout, gate, up, act)
                    dgate, dup = item(first, made, 0), item(first, made, 1)
                    swap(node, dgate)
                    swap(other, dup)

                if max(dout, up) < first:
                    sig = signature("n i, n i, n i -> n i, n i")
                    kind = info(node).dtype
                    return Match("gated_backward", "aten.mul.Tensor", sig, kind, replace)
    return None


def _half(cat: Any, source: Any, negated: int) -> bool:
    """``cat`` is the halves of ``source`` exchanged, the given one of the two results negated."""
    if not is_op(cat, "aten.cat.default") or len(cat.args[0]) != 2 or info(source) is None:
        return False
    rank = len(info(source).shape)
    width = info(source).shape[-1]
    parts = list(cat.args[0])
    if rank != 4 or (cat.args[1] if len(cat.args) > 1 else 0) not in (-1, 3) or width % 2:
        return False
    if not is_op(parts[negated], "aten.neg.default") or is_op(
        parts[1 - negated], "aten.neg.default"
    ):
        return False
    parts[negated] = parts[negated].args[0]
    bounds = ((width // 2, width), (0, width // 2))
    return all(
        is_op(p, "aten.slice.Tensor") and p.args[0] is source and p.args[1] in (3, -1)
        and p.args[2] == lo and min(p.args[3], width) == hi
        for p, (lo, hi) in zip(parts, bounds, strict=True)
    )  # fmt: skip


def rotary(node: fx.Node) -> Match | None:
    """``x cos + rotate(x) sin``, or its transpose ``g cos + rotate^T(g sin)``."""
    if not is_op(node, "aten.add.Tensor") or "alpha" in node.kwargs:
        return None
    for direct, turned in (node.args[:2], node.args[1::-1]):
        if not is_op(direct, "aten.mul.Tensor"):
            continue
        for x, cos in (direct.args[:2], direct.args[1::-1]):
            sin = _forward_sin(turned, x)
            transposed = sin is None
            if transposed:
                sin = _transposed_sin(turned, x)
            if sin is None or not all(_table(t, x) for t in (cos, sin)):
                continue

            def replace(
                x: Any = x, cos: Any = cos, sin: Any = sin, back: bool = transposed
            ) -> None:
                swap(node, before(node, calls.rotary, x, cos, sin, back))

            sig = signature("b h t e, b t r, b t r -> b h t e", "e r")
            return Match("rotary", "aten.add.Tensor", sig, info(node).dtype, replace)
    return None


def _table(value: Any, x: Any) -> bool:
    """``[B|1, 1, T, E]`` for ``x [B, H, T, E]``."""
    own, other = info(value), info(x)
    if own is None or other is None or len(own.shape) != 4 or len(other.shape) != 4:
        return False
    return own.shape[1] == 1 and own.shape[2:] == other.shape[2:]


def _forward_sin(turned: Any, x: Any) -> fx.Node | None:
    found = mul(turned, lambda a: _half(a, x, 0))
    return found[1] if found is not None else None


def _transposed_sin(turned: Any, g: Any) -> fx.Node | None:
    if not is_op(turned, "aten.cat.default") or len(turned.args[0]) != 2:
        return None
    first = turned.args[0][0]
    product = first.args[0] if is_op(first, "aten.slice.Tensor") else None
    if not _half(turned, product, 1):
        return None
    found = mul(product, lambda a: a is g)
    return found[1] if found is not None else None
