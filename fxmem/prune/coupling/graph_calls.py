"""Calls of a captured graph as the axis-signature table reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxmem.axes.signature import Call, Signature, TensorInfo, letters
from fxmem.axes.sizes import size
from fxmem.prune.coupling.routers import LAYOUT
from fxmem.rules.movement import reshape


def map_tensors(value: Any, f: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, list | tuple):
        return tuple(map_tensors(v, f) for v in value)
    return None


def _info(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorInfo(tuple(size(int(n)) for n in value.shape), value.dtype)
    return None


def operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(
        (node.args, node.kwargs),
        lambda n: found.append(n) if isinstance(n.meta.get("val"), torch.Tensor) else None,
    )
    return found


def call_of(node: fx.Node, op: str) -> Call | None:
    def value(n: fx.Node) -> Any:
        val = n.meta.get("val")
        return _info(val) if isinstance(val, torch.Tensor) else val

    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    val = node.meta.get("val")
    outs = tuple(_info(v) for v in (val if isinstance(val, list | tuple) else (val,)))
    if not outs or outs[0] is None:
        return None
    return Call(op, tuple(args), dict(kwargs), outs)


def module_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else "the model"


def strided_view(node: fx.Node, call: Call) -> Signature | None:
    """The signature of ``as_strided`` where it only regroups the elements of a whole tensor."""
    if str(node.target) != "aten.as_strided.default":
        return None
    x, out = node.args[0].meta["val"], node.meta["val"]
    plain = x.is_contiguous() and out.is_contiguous() and x.numel() == out.numel()
    return reshape(call) if plain and len(node.args) == 3 else None


def constant_slice(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> Signature | None:
    """The signature of ``x[..., [2, 3, 4]]``: a run of constant positions is a slice."""
    if str(node.target) != "aten.index.Tensor":
        return None
    (x, indices), shape = node.args[:2], node.meta["val"].shape
    given = [(i, n) for i, n in enumerate(indices) if n is not None]
    dim, index = given[0]
    while str(index.target) in LAYOUT:
        index = index.args[0]
    places = constants.get(index)
    if len(given) > 1 or places is None or places.dim() != 1 or not len(places):
        return None
    length = x.meta["val"].shape[dim]
    run = [int(p) % length for p in places]
    if places.dtype != torch.long or run != list(range(run[0], run[0] + len(run))):
        return None
    dims = letters("d", len(shape))
    shift = {f"d{dim}": size(run[0])}
    return Signature((dims, (("at",),)), (dims,), frozenset(("at",)), shift=shift)
