"""Masked models: what every smaller model must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxmem.prune.coupling import coupling as couple
from fxmem.prune.masks import Masks, consumer_keeps, router_keeps
from fxmem.prune.units import Coupling


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks, coupling: Coupling | None = None) -> Iterator[nn.Module]:
    """Inside the context ``model`` runs with removed units multiplied by zero.

    The zero meets a unit at the input of its consumer, by a forward pre-hook where a module call
    owns the consumer's matrix. Batched matrices (experts) have no such call: there the weight is
    masked along its contracted axis, ``W (m * x) = (W diag m) x``, out of place, so that
    gradients reach ``W``.

    Removed experts get the score minus infinity from their router, so the softmax is over the
    others and no token chooses them.
    """
    plan = couple(model) if coupling is None else coupling
    with contextlib.ExitStack() as stack:
        for (name, axis), keep in consumer_keeps(plan, masks).items():
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            weight = getattr(owner, leaf)
            if weight.dim() == 2 and not list(owner.children()):
                handle = owner.register_forward_pre_hook(_multiply(keep))
                stack.callback(handle.remove)
            else:
                _swap(stack, owner, leaf, weight, keep, axis)
        if routers := router_keeps(plan, masks):
            stack.enter_context(
                _Unchosen([(model.get_parameter(n), keep) for n, keep in routers.items()])
            )
        yield model


_PRODUCTS = (
    F.linear, torch.mm, torch.matmul, torch.addmm, Tensor.mm, Tensor.matmul, Tensor.__matmul__,
)  # fmt: skip


class _Unchosen(TorchFunctionMode):
    """Products with a router's weight give minus infinity for removed experts."""

    def __init__(self, routers: list[tuple[nn.Parameter, Tensor]]) -> None:
        super().__init__()
        self.routers = routers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            operands = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
            for weight, keep in self.routers:
                if any(x is weight or x._base is weight for x in operands):
                    out = out.masked_fill(~keep.to(out.device), -torch.inf)
        return out


def _multiply(keep: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * keep.to(args[0]), *args[1:])

    return hook


def _swap(
    stack: contextlib.ExitStack, owner: nn.Module, leaf: str, weight: Tensor, keep: Tensor,
    axis: int,
) -> None:  # fmt: skip
    shape = [1] * weight.dim()
    shape[axis] = -1
    if isinstance(weight, nn.Parameter):
        order = list(owner._parameters)
        del owner._parameters[leaf]
        stack.callback(_restore, owner, leaf, weight, order)
    setattr(owner, leaf, weight * keep.to(weight).view(shape))


def _restore(owner: nn.Module, leaf: str, weight: nn.Parameter, order: list[str]) -> None:
    delattr(owner, leaf)
    owner.register_parameter(leaf, weight)
    for name in order:  # the order of state_dict stays
        owner._parameters[name] = owner._parameters.pop(name)
