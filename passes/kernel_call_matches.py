"""Matches around functions that bodies call: attention, weight gradients, the token loss; and the
backward of a norm. See :mod:`fxmem.passes.kernel_matches`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxmem import runtime
from fxmem.kernels import attention, calls, token_nll
from fxmem.kernels.registry import find, signature
from fxmem.passes.kernel_matches import (
    Match,
    before,
    info,
    is_op,
    is_rsqrt,
    is_vector,
    item,
    mul,
    swap,
)

_VIEWS = ("aten.reshape.default",)


def _is_rstd(node: Any) -> bool:
    """The reciprocal root of a norm, before or after the norm was replaced."""
    if is_rsqrt(node):
        return True
    made = node.args[0] if isinstance(node, fx.Node) and node.target is operator.getitem else None
    return isinstance(made, fx.Node) and made.target is calls.norm and node.args[1] == 1


def norm_backward(node: fx.Node) -> Match | None:
    """``g r + 2 x sum(g x) (-1/2 r^3) / D`` with ``g = dy w``, and what else is added to it."""
    if not is_op(node, "aten.add.Tensor") or node.kwargs or info(node) is None:
        return None
    for straight, mean in (node.args[:2], node.args[1::-1]):
        found = _mean_part(mean)
        if found is None:
            continue
        g, x, r = found
        rest = None
        part = mul(straight, lambda a, r=r: a is r)
        if part is None and is_op(straight, "aten.add.Tensor") and not straight.kwargs:
            for direct, other in (straight.args[:2], straight.args[1::-1]):
                part = mul(direct, lambda a, r=r: a is r)
                if part is not None:
                    rest = other
                    break
        factors = mul(g, lambda a, g=g: is_vector(a, g))
        if part is None or part[1] is not g or factors is None:
            continue
        weight, dy = factors
        if info(dy) is None or info(dy).dtype != info(node).dtype:
            continue

        def replace(
            dy: Any = dy, x: Any = x, r: Any = r, w: Any = weight, rest: Any = rest
        ) -> None:
            dx = before(node, calls.norm_backward, dy, x, r, w)
            if rest is not None:
                dx.meta["info"] = info(node)
                dx = before(node, torch.ops.aten.add.Tensor, dx, rest)
            swap(node, dx)

        sig = signature("r d, r d, r, r, d -> r d, d, d", "d")
        op = "aten._fused_rms_norm_backward.default"
        return Match("norm_backward", op, sig, info(node).dtype, replace)
    return None


def _mean_part(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """``(g, x, r)`` of ``expand(2 (-1/2 sum(g x) r^3) / D) x``."""
    found = mul(node, lambda a: is_op(a, "aten.expand.default"))
    if found is None:
        return None
    wide, x = found
    scale, now = 1.0, wide.args[0]
    power = None
    while is_op(now, "aten.mul.Scalar", "aten.div.Scalar", "aten.mul.Tensor"):
        if is_op(now, "aten.mul.Tensor"):
            split = mul(now, lambda a: is_op(a, "aten.pow.Tensor_Scalar"))
            if split is None or power is not None:
                return None
            power, now = split
            continue
        factor = float(now.args[1])
        scale = scale * factor if is_op(now, "aten.mul.Scalar") else scale / factor
        now = now.args[0]
    if power is None or power.args[1] != 3 or not _is_rstd(power.args[0]):
        return None
    if not is_op(now, "aten.sum.dim_IntList") or now.args[2:3] != (True,) or info(x) is None:
        return None
    width, rank = int(info(x).shape[-1]), len(info(x).shape)
    product = mul(now.args[0], lambda a: a is x)
    if list(now.args[1]) not in ([-1], [rank - 1]) or product is None:
        return None
    return (product[1], x, power.args[0]) if abs(scale * width + 1.0) < 1e-12 else None


def weight_grad(node: fx.Node) -> Match | None:
    """``acc += a @ b``."""
    if node.target is not runtime.add_mm or info(node.args[1]) is None:
        return None

    def replace() -> None:
        before(node, calls.weight_grad, *node.args)
        node.graph.erase_node(node)

    sig = signature("n o, n i -> o i", "o i")
    return Match("weight_grad", "aten.mm.default", sig, info(node.args[1]).dtype, replace)


def attend(node: fx.Node) -> Match | None:
    """Attention of a chunk over spans of keys."""
    if node.target is not attention.forward or info(node.args[0]) is None:
        return None

    def replace() -> None:
        node.target = calls.attention_forward

    sig = find("chunk_attention").signature
    return Match(
        "chunk_attention", "fxmem.attention.default", sig, info(node.args[0]).dtype, replace
    )


def attend_backward(node: fx.Node) -> Match | None:
    """Its backward, which adds into dK and dV."""
    if node.target is not attention.backward or info(node.args[1]) is None:
        return None

    def replace() -> None:
        node.target = calls.attention_backward

    sig = find("chunk_attention_backward").signature
    op = "fxmem.attention_backward.default"
    return Match("chunk_attention_backward", op, sig, info(node.args[1]).dtype, replace)


def _made_by(node: Any) -> Any:
    """Behind views."""
    while is_op(node, *_VIEWS):
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users, views followed."""
    out = []
    for user in node.users:
        out += _readers(user) if is_op(user, *_VIEWS) else [user]
    return out


def _transposes(node: Any) -> tuple[Any, bool]:
    """``(matrix, whether it is turned)`` of a value that enters the body."""
    value, turned = node.meta.get("joint", node) if isinstance(node, fx.Node) else node, False
    while is_op(value, "aten.t.default"):
        value, turned = value.args[0], not turned
    return value, turned


def linear_nll(node: fx.Node) -> Match | None:
    """The token loss of ``h @ W^T`` and, where it is there, its backward to h and W."""
    if node.target is not token_nll.forward_:
        return None
    product = _made_by(node.args[0])
    if not is_op(product, "aten.mm.default") or info(product) is None:
        return None
    h, weight_t = product.args
    target, ignore = node.args[1:]
    back = [u for u in _readers(product) if u is not node]
    if len(back) != 1 or back[0].target is not token_nll.backward_ or _made_by(h) is None:
        return None
    (backward,) = back
    sums, others = [], []
    for user in _readers(backward):
        if is_op(user, "aten.t.default") and all(
            u.target is runtime.add_mm and u.args[2] is h for u in user.users
        ):
            sums += list(user.users)
        elif is_op(user, "aten.mm.default") and _made_by(user.args[0]) is backward:
            others.append(user)
        else:
            return None
    whole, turned = _transposes(weight_t)
    if len(sums) > 1 or len(others) != 1 or _transposes(others[0].args[1]) != (whole, not turned):
        return None

    def replace() -> None:
        made = before(node, calls.token_nll, h, weight_t, target, ignore)
        nll, entropy, lse = (item(node, made, i) for i in range(3))
        acc = sums[0].args[0] if sums else None
        dh = before(
            backward, calls.token_nll_backward, backward.args[0], h, weight_t, target, entropy, lse,
            ignore, acc,
        )  # fmt: skip
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(nll)
        swap(others[0], dh)
        for one in sums:
            one.graph.erase_node(one)

    sig = find("linear_nll").signature
    return Match("linear_nll", _LINEAR_NLL, sig, info(product).dtype, replace)


_LINEAR_NLL = find("linear_nll").ops[0]
