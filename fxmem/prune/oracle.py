"""Masked models: what every smaller model must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxmem.prune.coupling import coupling as couple
from fxmem.prune.masks import Masks, consumer_keeps
from fxmem.prune.units import Coupling


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks, coupling: Coupling | None = None) -> Iterator[nn.Module]:
    """Inside the context ``model`` runs with removed units multiplied by zero.

    The zero meets a unit at the input of its consumer, by a forward pre-hook where a module call
    owns the consumer's matrix. Batched matrices (experts) have no such call: there the weight is
    masked along its contracted axis, ``W (m * x) = (W diag m) x``, out of place, so that
    gradients reach ``W``.
    """
    plan = couple(model) if coupling is None else coupling
    with contextlib.ExitStack() as stack:
        for (name, axis), keep in consumer_keeps(plan, masks).items():
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            weight = getattr(owner, leaf)
            if weight.dim() == 2 and not list(owner.children()):
                handle = owner.register_forward_pre_hook(multiply(keep))
                stack.callback(handle.remove)
            else:
                _swap(stack, owner, leaf, weight, keep, axis)
        yield model


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
