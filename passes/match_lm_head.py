"""The LM head of a chunk body: a matrix product whose logits only the token loss reads.

See :mod:`fxmem.passes.match_pointwise`. Between product and loss there may be views, a change of
dtype and a softcap ``c tanh(x / c)``; the backward goes the same way back, to the hidden states and
to the accumulator of the weight's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxmem.kernels import calls, token_nll
from fxmem.kernels.registry import find
from fxmem.passes.match_pointwise import Match
from fxmem.program import body_ops as runtime
from fxmem.rewriting.patterns import (
    CAST,
    RESHAPES,
    before,
    behind,
    info,
    is_op,
    item,
    readers_past,
    swap,
)

_SAME = (*RESHAPES, CAST)
_LINEAR_NLL = find("linear_nll")


@dataclass(slots=True)
class _Head:
    """``product`` makes the logits, ``last`` is what the loss reads; ``cap`` is 0 without one."""

    product: fx.Node
    last: fx.Node
    cap: float = 0.0
    tanh: fx.Node | None = None


def linear_nll(node: fx.Node) -> Match | None:
    """The token loss of ``h @ W^T`` with its backward to h and, where it is there, W."""
    if node.target is not token_nll.forward_:
        return None
    head = _head(node.args[0])
    if head is None or info(head.product) is None:
        return None
    back = [u for u in readers_past(head.last, *_SAME) if u is not node]
    if len(back) != 1 or back[0].target is not token_nll.backward_:
        return None
    (backward,) = back
    gradient = _gradient(head, backward)
    if gradient is None or not _private(head, node, backward):
        return None
    h, weight_t = head.product.args
    ends = _ends(gradient, h)
    whole, turned = _transposes(weight_t)
    if ends is None or _transposes(ends[1].args[1]) != (whole, not turned):
        return None
    sums, dh_at = ends

    def replace() -> None:
        target, ignore = node.args[1:]
        made = before(node, calls.token_nll, h, weight_t, target, ignore, head.cap)
        nll, entropy, lse = (item(node, made, i) for i in range(3))
        acc = sums[0].args[0] if sums else None
        dh = before(
            backward, calls.token_nll_backward, backward.args[0], h, weight_t, target, entropy, lse,
            ignore, head.cap, acc,
        )  # fmt: skip
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(nll)
        swap(dh_at, dh)
        for one in sums:
            one.graph.erase_node(one)

    kind, kernel = info(head.product).dtype, _LINEAR_NLL
    return Match(kernel.name, kernel.ops[0], kernel.signature, kind, replace, node)


def _head(logits: Any) -> _Head | None:
    last = behind(logits, *_SAME)
    if is_op(last, "aten.mm.default"):
        return _Head(last, last)
    if not is_op(last, "aten.mul.Tensor") or not isinstance(last.args[1], (int, float)):
        return None
    cap, tanh = float(last.args[1]), behind(last.args[0], *_SAME)
    if not is_op(tanh, "aten.tanh.default"):
        return None
    divided = behind(tanh.args[0], *_SAME)
    if not is_op(divided, "aten.div.Tensor") or divided.args[1] != cap or cap <= 0:
        return None
    product = behind(divided.args[0], *_SAME)
    return _Head(product, last, cap, tanh) if is_op(product, "aten.mm.default") else None


def _gradient(head: _Head, backward: fx.Node) -> fx.Node | None:
    """Where the gradient of the product stands, back through the softcap."""
    if head.tanh is None:
        return backward
    now = backward
    for name, at in (("mul.Tensor", 1), ("tanh_backward.default", None), ("div.Tensor", 1)):
        (reader, *others) = readers_past(now, *_SAME) or [None]
        if others or not is_op(reader, f"aten.{name}") or behind(reader.args[0], *_SAME) is not now:
            return None
        if reader.args[1] != (head.cap if at else head.tanh):
            return None
        now = reader
    return now


def _private(head: _Head, forward: fx.Node, backward: fx.Node) -> bool:
    """Nobody else reads the logits, before or after the softcap."""
    if set(readers_past(head.last, *_SAME)) != {forward, backward}:
        return False
    if head.tanh is None:
        return True
    divided = behind(head.tanh.args[0], *_SAME)
    slopes = [u for u in readers_past(head.tanh, *_SAME) if u is not head.last]
    return (
        readers_past(head.product, *_SAME) == [divided]
        and readers_past(divided, *_SAME) == [head.tanh]
        and len(slopes) == 1
        and is_op(slopes[0], "aten.tanh_backward.default")
    )


def _ends(gradient: fx.Node, h: Any) -> tuple[list[fx.Node], fx.Node] | None:
    """The addition to the weight's accumulator, if any, and the product that gives dH."""
    sums: list[fx.Node] = []
    others = []
    for user in readers_past(gradient, *_SAME):
        if is_op(user, "aten.t.default") and all(
            u.target is runtime.add_mm and u.args[2] is h for u in user.users
        ):
            sums += list(user.users)
        elif is_op(user, "aten.mm.default") and behind(user.args[0], *_SAME) is gradient:
            others.append(user)
        else:
            return None
    return (sums, others[0]) if len(sums) <= 1 and len(others) == 1 else None


def _transposes(node: Any) -> tuple[Any, bool]:
    """``(matrix, whether it is turned)`` of a value that enters the body."""
    value, turned = node.meta.get("joint", node) if isinstance(node, fx.Node) else node, False
    while is_op(value, "aten.t.default"):
        value, turned = value.args[0], not turned
    return value, turned
