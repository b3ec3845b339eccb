"""Importance of single units: the baselines of pruning, in the units of the search.

All are read at the consumer, the weight that takes the units as its input (attention's and the
MLP's output projection; for channels of the width all matrices that read the residual stream):

- ``magnitude``: sum of absolute weights of the unit's columns.
- ``wanda``: mean absolute weight times the norm of its input, summed over the columns; the
  structured form used to start the pruner of arXiv 2406.10576 (Wanda: arXiv 2306.11695).
- ``taylor``: mean over batches of the squared first-order change of the loss when the unit goes,
  ``(sum w dL/dw)^2`` (arXiv 1906.10771); needs one backward per batch.
- ``random``: uniform noise from the seed.

An expert's consumer is the matrix that gives its output; "wanda" sees the tokens routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.distributed.whole import check_whole
from fxmem.errors import PlanError, UnsupportedOpError
from fxmem.frontend.experts import Watch, watching
from fxmem.prune.shrink.gate_gradients import Gates
from fxmem.prune.units.units import Group, unit_of

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
        UnsupportedOpError: a consumer whose input cannot be observed ("wanda").
    """
    check_whole(model)
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
    return _summed(groups, lambda name, axis: _weighted(model, name, axis, norms[name]))


def _weighted(model: nn.Module, name: str, axis: int, norm: Tensor) -> Tensor:
    """Mean absolute weight times input norm, per position of ``axis``.

    ``norm``: ``[input]``, or ``[experts, input]`` of a weight with an axis of experts.
    """
    if norm.dim() == 1:
        return _lines(model, name, axis).abs().mean(0).double().cpu() * norm
    weight = model.get_parameter(name).detach()
    if weight.dim() == 2:  # a bias: it has no input
        return torch.zeros(len(norm), dtype=torch.float64)
    line = weight.abs().mean(_outputs(model, name)).double().cpu() * norm
    return line.sum(1 if axis == 0 else 0)


def _outputs(model: nn.Module, name: str) -> int:
    """The axis of the outputs in a weight ``[experts, ., .]``."""
    return 2 if getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False) else 1


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
    """Root of the summed squares of every input feature of the consumers.

    Of experts ``[experts, input]``, each of the tokens that chose it; zeros for their biases.
    """
    sums: dict[str, Tensor] = {}
    consumers = _consumers(groups)
    with ExitStack() as stack:
        for name, axis in consumers:
            if model.get_parameter(name).dim() == 2 and not _bias(model, name, consumers):
                _watch(stack, model, name, axis, sums)
        stack.enter_context(watching(model, _routed(model, consumers, sums)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        for batch in batches:
            model(**batch)
    for name, _ in consumers:
        if name not in sums and _bias(model, name, consumers):
            sums[name] = torch.zeros(len(model.get_parameter(name)), 1)
        elif name not in sums:
            raise _unseen(name)
    return {name: total.sqrt() for name, total in sums.items()}


def _bias(model: nn.Module, name: str, consumers: Sequence[tuple[str, int]]) -> bool:
    """Whether a consumer is the bias ``[experts, output]`` beside a weight of experts."""
    beside = name.rpartition(".")[0] + "."
    return model.get_parameter(name).dim() == 2 and any(
        n.startswith(beside) and model.get_parameter(n).dim() == 3 for n, _ in consumers
    )


def _unseen(name: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        "the input of this weight is not the input of its module",
        module=name,
        advice='use the "taylor" or "magnitude" importance for these units',
    )


def _watch(
    stack: ExitStack, model: nn.Module, name: str, axis: int, sums: dict[str, Tensor]
) -> None:
    """Add up the squares of the input of the modules that own a matrix."""
    weight = model.get_parameter(name)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is not None and not x.is_floating_point():
            return  # the lookup in a tied embedding: its product is what counts
        if x is None or x.shape[-1] != weight.shape[axis]:
            raise _unseen(name)
        square = x.detach().double().square().flatten(0, -2).sum(0).cpu()
        sums[name] = sums[name] + square if name in sums else square

    for module in model.modules():
        if any(p is weight for p in module._parameters.values()):
            stack.callback(module.register_forward_pre_hook(hook).remove)


def _routed(
    model: nn.Module, consumers: Sequence[tuple[str, int]], sums: dict[str, Tensor]
) -> Watch:
    """Adds up the squares of the input of every expert, from the tokens that chose it."""
    names = {id(model.get_parameter(n)): n for n, _ in consumers}

    def watch(weight: Tensor, x: Tensor, index: Tensor) -> None:
        name = names.get(id(weight))
        if name is not None:
            square = torch.zeros(len(weight), x.shape[-1], dtype=torch.float64, device=x.device)
            square.index_add_(0, index, x.detach().double().square())
            sums[name] = sums.get(name, 0.0) + square.cpu()

    return watch


def _consumers(groups: Sequence[Group]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((name, axis) for group in groups for name, axis, _ in group.consumer))


def _taylor(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], groups: Sequence[Group]
) -> dict[str, Tensor]:
    """By gates, so no weight gets a gradient."""
    total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    with Gates(model, groups) as gates:
        for batch in batches:
            for name, change in gates(batch)[1].items():
                total[name] += change.square()
    return {name: value / len(batches) for name, value in total.items()}
