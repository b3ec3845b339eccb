"""Masked models: what every smaller model must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxmem.distributed.whole import check_whole
from fxmem.errors import MaskError
from fxmem.prune.coupling.find_groups import coupling as couple
from fxmem.prune.units.masks import Masks, axis_keeps, consumer_keeps, router_keeps
from fxmem.prune.units.units import Coupling


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks, coupling: Coupling | None = None) -> Iterator[nn.Module]:
    """Inside the context ``model`` runs with removed units multiplied by zero.

    The zero meets a unit at the input of its consumer, by a forward pre-hook where a module call
    is the product with the consumer's matrix. Elsewhere (experts, convolutions, weights that other
    modules read) the weight is masked along its contracted axis, ``W (m * x) = (W diag m) x``, out
    of place, so that gradients reach ``W``.

    Channels of the width are zero from where they are written: embeddings, output projections and
    biases give zeros there, and RMSNorm averages over all channels, zeros included. Gradients equal
    the smaller model's; its norm weight is ``w' = w sqrt(D / D')`` (``1 + w`` likewise), so the
    gradient of ``w'`` times that root is the gradient of ``w``.

    Removed experts get the score minus infinity from their router, so the softmax is over the
    others and no token chooses them.
    """
    check_whole(model)
    plan = couple(model) if coupling is None else coupling
    with contextlib.ExitStack() as stack:
        homes = _homes(model)
        for (name, axis), keep in consumer_keeps(plan, masks).items():
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            if takes_mask(owner, leaf, name, unowned(plan)):
                handle = owner.register_forward_pre_hook(multiply(keep))
                stack.callback(handle.remove)
                continue
            # One whose mask along another axis is there already is no parameter any more.
            places = homes.get(id(getattr(owner, leaf)), [(owner, leaf)])
            for home, leaf in places:
                _swap(stack, home, leaf, getattr(home, leaf), keep, axis)
        _silence_writers(stack, model, plan, masks)
        if routers := router_keeps(plan, masks):
            stack.enter_context(
                _Unchosen([(model.get_parameter(n), keep) for n, keep in routers.items()])
            )
        yield model


def unowned(coupling: Coupling) -> frozenset[str]:
    """Consumers that something else than a call of their module multiplies."""
    return frozenset(n for g in coupling.groups for n in g.unowned)


def takes_mask(owner: nn.Module, leaf: str, name: str, elsewhere: Collection[str]) -> bool:
    """Whether a mask on the input of a module's calls is one on what its weight is multiplied by.

    Args:
        owner: the module. leaf, name: the weight's name in it, and in the model.
        elsewhere: weights for which it is not (`unowned`).
    """
    weight: Tensor = getattr(owner, leaf)
    return weight.dim() == 2 and not list(owner.children()) and name not in elsewhere


def _homes(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules that hold each parameter, and its name there, by identity."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, p in module._parameters.items():
            homes.setdefault(id(p), []).append((module, leaf))
    return homes


def _silence_writers(
    stack: contextlib.ExitStack, model: nn.Module, plan: Coupling, masks: Masks
) -> None:
    """Zero what writes into removed channels of the width; matrices that only read are left."""
    groups = [g for g in plan.groups if g.kind == "width"]
    written = {(n, i) for g in groups for n, i, _ in g.members}
    read = {(n, i) for g in groups for n, i, _ in g.consumer}
    owners = _homes(model)
    masked = dict(model.named_parameters())
    for (name, axis), keep in axis_keeps(plan, masks).items():
        if (name, axis) not in written:
            continue
        path, _, leaf = name.rpartition(".")
        homes = owners[id(masked[name])] if name in masked else [(model.get_submodule(path), leaf)]
        if len(homes) == 1 and (name, axis) in read:
            continue
        owner, weight = homes[0][0], getattr(*homes[0])
        if len(homes) == 1 and weight.dim() == 2 and not list(owner.children()):
            # An activation's worth of memory, not a copy of the matrix.
            stack.callback(owner.register_forward_hook(_zero_output(keep, name)).remove)
            continue
        for home, leaf in homes:
            _swap(stack, home, leaf, getattr(home, leaf), keep, axis)


def _zero_output(keep: Tensor, name: str) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> Tensor:
        if not isinstance(out, Tensor) or out.shape[-1] != len(keep):
            raise MaskError(
                "the output of this module is not what its weight writes", module=name,
                advice="masks of other units than the width are not affected",
            )  # fmt: skip
        return out * keep.to(out)

    return hook


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


def multiply(keep: Tensor) -> Any:
    """A forward pre-hook that multiplies a module's first argument by ``keep`` (last axis)."""

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
