"""Importance of single units: the baselines of pruning, in the units of the search.

All are read at the consumer, the weight that takes the units as its input (attention's and the
MLP's output projection; for channels of the width all matrices that read the residual stream):

- ``magnitude``: sum of absolute weights of the unit's columns.
- ``wanda``: mean absolute weight times the norm of its input, summed over the columns; the
  structured form used to start the pruner of arXiv 2406.10576 (Wanda: arXiv 2306.11695).
- ``taylor``: mean over batches of the squared first-order change of the loss when the unit goes,
  ``(sum w dL/dw)^2`` (arXiv 1906.10771); needs one backward per batch.
- ``random``: uniform noise from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import PlanError, UnsupportedOpError
from fxmem.prune.space import Group
from fxmem.prune.units import Path

METHODS = ("magnitude", "wanda", "taylor", "random")


def importance(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    method: str,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Per group the importance of its units, float64 (size,), on the CPU.

    Args:
        model: the dense model; unchanged, gradients and modes included.
        batches: keyword arguments of the model, with labels; not used by magnitude and random.
        groups: from `fxmem.coupling`.
        method: one of `METHODS`.
        seed: for "random".

    Raises:
        PlanError: unknown method, or no batch where one is needed.
        UnsupportedOpError: a consumer whose input cannot be observed ("wanda" on fused experts).
    """
    if method not in METHODS:
        raise PlanError(f"method is {method!r}", advice=f"one of {', '.join(METHODS)}")
    if method in ("wanda", "taylor") and not batches:
        raise PlanError(f"{method} without batches", advice="give at least one batch")
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            group.name: torch.rand(group.size, generator=generator, dtype=torch.float64)
            for group in groups
        }
    if method == "taylor":
        return _taylor(model, batches, groups)
    if method == "magnitude":
        return _summed(groups, lambda name, axis: _lines(model, name, axis).abs().sum(0))
    norms = _input_norms(model, batches, groups)
    return _summed(
        groups,
        lambda name, axis: _lines(model, name, axis).abs().mean(0).double().cpu() * norms[name],
    )


def _summed(groups: Sequence[Group], line: Callable[[str, int], Tensor]) -> dict[str, Tensor]:
    """Values per position of the consumers' input axes, summed over each unit's positions."""
    out = {}
    for group in groups:
        total = torch.zeros(group.size + 1, dtype=torch.float64)
        for name, axis, path in group.consumer:
            values = line(name, axis).double().cpu()
            total.index_add_(0, unit_of(len(values), path, group.size), values)
        out[group.name] = total[: group.size]
    return out


def unit_of(length: int, path: Path, size: int) -> Tensor:
    """The unit of each position of an axis, int (length,); `size` where it belongs to none."""
    index, before, after = torch.arange(length), 1, 1
    for kind, a, b in path:
        if kind == "segment":
            index = index[a : a + b]
        elif kind == "inner":
            before = a
        else:
            after = a
    owner = torch.full((length,), size)
    owner[index] = torch.arange(size).view(1, size, 1).expand(before, size, after).reshape(-1)
    return owner


def _lines(model: nn.Module, name: str, axis: int) -> Tensor:
    """A weight as (everything else, input positions)."""
    weight = model.get_parameter(name).detach().movedim(axis, -1)
    return weight.reshape(-1, weight.shape[-1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _input_norms(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], groups: Sequence[Group]
) -> dict[str, Tensor]:
    """Root of the summed squares of every input feature of the consumers."""
    sums: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, axis: int) -> None:
        weight = model.get_parameter(name)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if x is not None and not x.is_floating_point():
                return  # the lookup in a tied embedding: its product is what counts
            if x is None or weight.dim() != 2 or x.shape[-1] != weight.shape[axis]:
                raise UnsupportedOpError(
                    "the input of this weight is not the input of its module",
                    module=name,
                    advice='use the "taylor" or "magnitude" importance for these units',
                )
            square = x.detach().double().square().flatten(0, -2).sum(0).cpu()
            sums[name] = sums[name] + square if name in sums else square

        for module in model.modules():
            if any(p is weight for p in module._parameters.values()):
                handles.append(module.register_forward_pre_hook(hook))

    try:
        for name, axis in _consumers(groups).items():
            watch(name, axis)
        with torch.no_grad(), _evaluating(model):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def _consumers(groups: Sequence[Group]) -> dict[str, int]:
    return {name: axis for group in groups for name, axis, _ in group.consumer}


def _taylor(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], groups: Sequence[Group]
) -> dict[str, Tensor]:
    """Only the consumers get gradients, so the backward keeps little more than activations."""
    axes = _consumers(groups)
    wanted = {name: model.get_parameter(name) for name in axes}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    try:
        for p, _ in flags:
            p.requires_grad_(any(p is consumer for consumer in wanted.values()))
        with _evaluating(model), torch.enable_grad():
            for batch in batches:
                grads = torch.autograd.grad(model(**batch).loss, list(wanted.values()))
                lines = {
                    name: (wanted[name].detach() * grad).movedim(axis, -1).flatten(0, -2).sum(0)
                    for (name, axis), grad in zip(axes.items(), grads, strict=True)
                }
                changes = _summed(groups, lambda name, axis, lines=lines: lines[name])  # type: ignore[misc]
                for name, change in changes.items():
                    total[name] += change.square()
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return {name: value / len(batches) for name, value in total.items()}
