"""Norms in a chunk body: RMSNorm written out by models, LayerNorm as ATen's own operators.

See :mod:`fxmem.passes.match_pointwise`. A norm in half precision computes inside in float32; where
it rounds (before the weight, as Llama does, or after it, as Gemma does) makes no difference to the
match: the kernel rounds once.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

from torch import fx

from fxmem.kernels import calls
from fxmem.kernels.kernel import signature
from fxmem.passes.match_pointwise import Match
from fxmem.program import body_ops as runtime
from fxmem.rewriting.patterns import before, info, is_op, item, mean_square, mul, swap, uncast

_FORWARD = signature("r d, d, d -> r d, r, r", "d")
_BACKWARD = signature("r d, r d, r, r, d -> r d, d, d", "d")


def is_rstd(node: Any) -> bool:
    """The reciprocal root of a norm, before or after the norm was replaced."""
    if mean_square(node) is not None:
        return True
    made = node.args[0] if isinstance(node, fx.Node) and node.target is operator.getitem else None
    return isinstance(made, fx.Node) and made.target is calls.norm and node.args[1] == 1


def is_vector(weight: Any, like: Any) -> bool:
    """A value of the last dimension's size alone that enters the body whole."""
    own, other = info(weight), info(like)
    if own is None or other is None or weight.op != "placeholder":
        return False
    return own.shape[-1:] == other.shape[-1:] and all(d == 1 for d in own.shape[:-1])


def norm(node: fx.Node) -> Match | None:
    """``w * (x * rsqrt(mean(x^2) + eps))``, cast inside or at the end."""
    product = uncast(node)
    normed = mul(product, lambda a: mul(uncast(a), mean_square) is not None)
    if normed is None:
        return None
    inner, weight = uncast(normed[0]), normed[1]
    found = mul(inner, mean_square)
    root = None if found is None else mean_square(found[0])
    if found is None or root is None:
        return None
    r, wide = found
    x = uncast(wide)
    if root.x is not wide or not is_vector(weight, node) or info(x) is None or info(node) is None:
        return None
    if info(x).dtype != info(node).dtype:
        return None

    def replace() -> None:
        made = before(r, calls.norm, x, weight, float(root.eps))
        y, rstd = item(r, made, 0), item(r, made, 1)
        swap(r, rstd)
        swap(node, y)

    return Match("norm", "aten._fused_rms_norm.default", _FORWARD, info(node).dtype, replace, r)


def norm_backward(node: fx.Node) -> Match | None:
    """``g r + 2 x sum(g x) (-1/2 r^3) / D`` with ``g = dy w``, and what else is added to it; and
    the sum of ``dy x r`` over rows where it goes into an accumulator.
    """
    if not is_op(node, "aten.add.Tensor") or node.kwargs or info(node) is None:
        return None
    for straight, mean in (node.args[:2], node.args[1::-1]):
        found = _mean_part(mean)
        if found is None:
            continue
        g, wide, r = found
        part, rest = _straight_part(straight, r)
        factors = mul(uncast(g), partial(is_vector, like=g))
        if part is not g or factors is None:
            continue
        weight, dy, x = factors[0], uncast(factors[1]), uncast(wide)
        root = _cast_to(node, info(dy))
        if root is None or info(x) is None or info(x).dtype != info(root).dtype:
            continue
        if rest is not None and root is not node:
            continue

        def replace(
            root: fx.Node = root, dy: Any = dy, x: Any = x, wide: Any = wide, r: Any = r,
            w: Any = weight, rest: Any = rest,
        ) -> None:  # fmt: skip
            sums = _weight_sums(dy, wide, r)
            acc = sums[0].args[0] if sums else None
            dx = before(root, calls.norm_backward, dy, x, r, w, acc)
            if rest is not None:
                dx.meta["info"] = info(root)
                dx = before(root, root.target, dx, rest)
            swap(root, dx)
            for one in sums:
                root.graph.erase_node(one)

        op = "aten._fused_rms_norm_backward.default"
        return Match("norm_backward", op, _BACKWARD, info(root).dtype, replace, r)
    return None


def _straight_part(straight: Any, r: fx.Node) -> tuple[Any, Any]:
    """``(g, rest)`` of ``g r + rest``; rest is None where nothing is added."""
    part = mul(straight, lambda a: a is r)
    if part is not None:
        return part[1], None
    if is_op(straight, "aten.add.Tensor") and not straight.kwargs:
        for direct, other in (straight.args[:2], straight.args[1::-1]):
            part = mul(direct, lambda a: a is r)
            if part is not None:
                return part[1], other
    return None, None


def _cast_to(node: fx.Node, like: Any) -> fx.Node | None:
    """``node``, or the cast that is its only reader, in the dtype of ``like``."""
    if like is None or info(node).dtype == like.dtype:
        return node if like is not None else None
    (reader, *others) = node.users
    fits = is_op(reader, "aten._to_copy.default") and info(reader) is not None
    return reader if fits and not others and info(reader).dtype == like.dtype else None


def _weight_sums(dy: fx.Node, wide: fx.Node, r: fx.Node) -> list[fx.Node]:
    """The one addition ``acc += sum(dy x r)`` over all rows, if there is one."""
    readers = [u for n in (dy, *dy.users) if n is dy or uncast(n) is dy for u in n.users]
    for product in readers:
        factors = mul(product, lambda a: uncast(a) is dy)
        normed = None if factors is None else mul(uncast(factors[1]), lambda a: a is r)
        if normed is None or normed[1] is not wide or len(product.users) != 1:
            continue
        (total,) = product.users
        rank = len(info(product).shape)
        if not is_op(total, "aten.sum.dim_IntList") or list(total.args[1]) != [*range(rank - 1)]:
            continue
        if len(total.users) == 1 and next(iter(total.users)).target is runtime.add:
            return list(total.users)
    return []


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
    if power is None or power.args[1] != 3 or not is_rstd(power.args[0]):
        return None
    if not is_op(now, "aten.sum.dim_IntList") or now.args[2:3] != (True,) or info(x) is None:
        return None
    width, rank = int(info(x).shape[-1]), len(info(x).shape)
    product = mul(now.args[0], lambda a: a is x)
    if list(now.args[1]) not in ([-1], [rank - 1]) or product is None:
        return None
    return (product[1], x, power.args[0]) if abs(scale * width + 1.0) < 1e-12 else None


def layer_norm(node: fx.Node) -> Match | None:
    """``native_layer_norm`` over the last dimension."""
    if not is_op(node, "aten.native_layer_norm.default") or len(node.args[1]) != 1:
        return None
    return _retarget(node, "norm", calls.layer_norm, node.args[0], _FORWARD)


def layer_norm_backward(node: fx.Node) -> Match | None:
    """Its backward; the weight's and bias's parts are sums over the rows of the chunk."""
    if not is_op(node, "aten.native_layer_norm_backward.default") or len(node.args[2]) != 1:
        return None
    return _retarget(node, "norm_backward", calls.layer_norm_backward, node.args[1], _BACKWARD)


def _retarget(node: fx.Node, kernel: str, call: Any, x: Any, sig: Any) -> Match | None:
    """The same arguments and results, by ``call``."""
    if info(x) is None:
        return None

    def replace() -> None:
        node.target = call

    return Match(kernel, str(node.target), sig, info(x).dtype, replace, node)
