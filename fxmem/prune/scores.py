"""Importance of single units: the baselines of pruning, in the units of the search.

All are read at the consumer, the weight that takes the units as its input (attention's and the
MLP's output projection):

- ``magnitude``: sum of absolute weights of the unit's columns.
- ``wanda``: mean absolute weight times the norm of its input, summed over the columns; the
  structured form used to start the pruner of arXiv 2406.10576 (Wanda: arXiv 2306.11695).
- ``taylor``: mean over batches of the squared first-order change of the loss when the unit goes,
  ``(sum w dL/dw)^2`` (arXiv 1906.10771); needs one backward per batch.
- ``random``: uniform noise from the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import PlanError, UnsupportedOpError
from fxmem.prune.space import Group

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
    weights = {}
    for group in groups:
        module, weight = _consumer(model, group)
        weights[group.name] = _columns(weight, group, input_axis(module, weight))
    if method == "magnitude":
        return {name: w.abs().sum((0, 2)).double().cpu() for name, w in weights.items()}
    norms = _input_norms(model, batches, groups)
    out = {}
    for group in groups:
        mean = weights[group.name].abs().mean(0)
        norm = norms[group.name].view(group.size, -1).to(mean.device)
        out[group.name] = (mean * norm).sum(1).double().cpu()
    return out


def _consumer(model: nn.Module, group: Group) -> tuple[nn.Module, Tensor]:
    path, _, name = group.consumer.rpartition(".")
    module = model.get_submodule(path)
    return module, getattr(module, name).detach()


def input_axis(module: nn.Module, weight: Tensor) -> int:
    """The axis of a weight that meets the input: the last, except where `in_features` says so."""
    # transformers' Conv1D keeps [in, out] and names its output size nf.
    return 0 if getattr(module, "nf", None) == weight.shape[-1] and weight.dim() == 2 else -1


def _columns(weight: Tensor, group: Group, axis: int = -1) -> Tensor:
    """A weight as (rest, size, columns per unit), float32 or better."""
    moved = weight.movedim(axis, -1).reshape(-1, weight.shape[axis])
    return moved.unflatten(1, (group.size, -1))


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

    def watch(group: Group, module: nn.Module, features: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if x is None or x.shape[-1] != features:
                raise UnsupportedOpError(
                    "the input of this weight is not the input of its module",
                    module=group.consumer,
                    advice='use the "taylor" or "magnitude" importance for these units',
                )
            square = x.detach().double().square().flatten(0, -2).sum(0)
            sums[group.name] = sums.get(group.name, 0) + square  # type: ignore[arg-type]

        handles.append(module.register_forward_pre_hook(hook))

    try:
        for group in groups:
            module, weight = _consumer(model, group)
            watch(group, module, weight.shape[input_axis(module, weight)])
        with torch.no_grad(), _evaluating(model):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def _taylor(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], groups: Sequence[Group]
) -> dict[str, Tensor]:
    """Only the consumers get gradients, so the backward keeps little more than activations."""
    consumers = {group.name: model.get_parameter(group.consumer) for group in groups}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    wanted = {id(p) for p in consumers.values()}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        with _evaluating(model), torch.enable_grad():
            for batch in batches:
                grads = torch.autograd.grad(model(**batch).loss, list(consumers.values()))
                for group, grad in zip(groups, grads, strict=True):
                    module, weight = _consumer(model, group)
                    product = _columns(weight * grad, group, input_axis(module, weight))
                    total[group.name] += product.sum((0, 2)).double().cpu().square()
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return {name: value / len(batches) for name, value in total.items()}
