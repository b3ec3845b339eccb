"""Least squares for the weights that read what is left: a smaller model nearer to the dense one.

A consumer that lost some of its inputs is solved again, so that what is left stands in for what is
gone: ``min sum_t c_t |x_t D - r_t|^2 + ridge |D|^2``, where ``x`` are the inputs that stay, ``r``
what the removed ones would add, and D is added to the weight (SlimGPT: arXiv 2412.18110, without
its order of removal). Both come from one forward of the masked model in which every consumer is
repaired as its input arrives, so they carry the error of the layers before.

A token's weight is ``c = 1 / (|y|^2 + median |y|^2)``, y being the output: without it the few
tokens with outputs hundreds of times as large, which decoders have, decide alone.

Held-in rows, a quarter of them, choose the ridge of every consumer, no change among the choices,
and in the end how far all weights go towards their solutions, not at all among the choices: layers
that are solved one by one correct too much together. So on these rows the loss is never above that
without repair.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import PlanError
from fxmem.frontend.inputs import without_cache
from fxmem.prune.shrink.gate_gradients import loss_of
from fxmem.prune.shrink.masked import masked, takes_mask, unowned
from fxmem.prune.shrink.size_attributes import evaluating
from fxmem.prune.units.masks import Masks, consumer_keeps
from fxmem.prune.units.units import Coupling, UnitGroup

RIDGES = (1e-2, 1e-1, 1.0, 1e1)
"""Times the mean square of an input; no change is a ridge without end."""
Batch = Mapping[str, Any]


class _Enough(Exception):  # noqa: N818 - no error: all consumers have been met
    pass


@dataclass
class _Consumer:
    """One weight to solve again.

    Attributes:
        path, leaf, axis: its module, name, and the axis that is contracted.
        keep: bool, the inputs that stay.
        x: the input that has arrived, all units of it.
        change: to add to the weight, (kept inputs, outputs). shift: to add to the bias.
    """

    path: str
    leaf: str
    axis: int
    keep: Tensor
    x: Tensor | None = None
    solved: bool = False
    change: Tensor | None = None
    shift: Tensor | None = None


@torch.no_grad()
def repair(
    model: nn.Module, small: nn.Module, plan: Coupling, masks: Masks,
    bare: Sequence[UnitGroup], batches: Sequence[Batch],
) -> None:  # fmt: skip
    """Solve the consumers of `small` again, in place.

    Matrices of experts, and layers that keep no unit, stay as they are. The rows run together, once
    through the dense model up to the last consumer; a quarter of them four times through `small`.

    Args:
        model: the dense model, unchanged.
        small: the model that `masks` leave of it.
        plan: coupling of `model`.
        bare: groups that keep one unit only so that the layer runs.
        batches: keyword arguments of the model with labels, all of one shape, two rows at least.

    Raises:
        PlanError: batches of different shapes, too few rows, or no labels.
    """
    rows = _together(batches)
    held = rows // 4 or 1
    joined = {
        k: torch.cat([b[k] for b in batches]) if isinstance(v, Tensor) else v
        for k, v in batches[0].items()
    }
    tail = {k: v[rows - held :] if isinstance(v, Tensor) else v for k, v in joined.items()}
    found = _consumers(model, plan, masks, {n for group in bare for n, _, _ in group.consumer})
    with evaluating(model), evaluating(small):
        without = float(loss_of(small(**without_cache(small, tail))))
        _solve_in_turn(model, plan, masks, found, joined, 1 - held / rows)
        before = {n: p.detach().clone() for n, p in small.named_parameters() if _solved(n, found)}

        def loss(step: float) -> float:
            for name, weight in before.items():
                small.get_parameter(name).copy_(weight)
            for consumer in found if step else ():
                _add(small, consumer, step)
            value = float(loss_of(small(**without_cache(small, tail))))
            return value if math.isfinite(value) else math.inf

        tried = {0.0: without, 0.5: loss(0.5), 1.0: loss(1.0)}
        between = _lowest(*tried.values())
        tried.setdefault(between, loss(between))
        best = min(tried, key=lambda step: (tried[step], step))
        if best != between:
            loss(best)


def _lowest(none: float, half: float, full: float) -> float:
    """Where the parabola through the losses at steps 0, 1/2 and 1 is lowest, in [1/4, 1]."""
    bend = 2 * (none - 2 * half + full)
    if not math.isfinite(bend) or bend <= 0:
        return 0.25
    return min(1.0, max(0.25, (3 * none - 4 * half + full) / (2 * bend)))


def _together(batches: Sequence[Batch]) -> int:
    shapes = [{k: v.shape for k, v in b.items() if isinstance(v, Tensor)} for b in batches]
    if not shapes or any(s != shapes[0] for s in shapes) or not shapes[0]:
        raise PlanError(
            f"repair from {len(shapes)} batches of different shapes" if shapes else
            "repair without batches", advice="give batches of one shape, with labels",
        )  # fmt: skip
    rows = len(shapes) * next(iter(shapes[0].values()))[0]
    if rows < 2:
        raise PlanError("repair from one row", advice="give two rows or more: some are held in")
    return rows


def _consumers(model: nn.Module, plan: Coupling, masks: Masks, silent: set[str]) -> list[_Consumer]:
    """Matrices that one module multiplies its input by, and that lose some of it."""
    found = []
    for (name, axis), keep in consumer_keeps(plan, masks).items():
        path, _, leaf = name.rpartition(".")
        home = model.get_submodule(path)
        called = takes_mask(home, leaf, name, unowned(plan))
        if called and name not in silent and bool(keep.any()) and not bool(keep.all()):
            found.append(_Consumer(path, leaf, axis, keep))
    return found


def _solve_in_turn(
    model: nn.Module, plan: Coupling, masks: Masks, found: Sequence[_Consumer], batch: Batch,
    part: float,
) -> None:  # fmt: skip
    """One forward of the masked model, each consumer solved with the input that reaches it."""
    if not found:
        return
    with contextlib.ExitStack() as stack:
        left = [len(found)]
        for consumer in found:
            home = model.get_submodule(consumer.path)
            # before the mask's own hook, so that it sees what is removed too
            stack.callback(home.register_forward_pre_hook(_arriving(consumer)).remove)
            stack.callback(home.register_forward_hook(_leaving(consumer, part, left)).remove)
        stack.enter_context(masked(model, masks, plan))
        stack.enter_context(contextlib.suppress(_Enough))
        model(**without_cache(model, batch))


def _arriving(consumer: _Consumer) -> Any:
    def hook(home: nn.Module, args: tuple[Any, ...]) -> None:
        consumer.x = args[0]

    return hook


def _leaving(consumer: _Consumer, part: float, left: list[int]) -> Any:
    def hook(home: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        x, consumer.x = consumer.x, None
        assert x is not None
        keep = consumer.keep.to(x.device)
        if not consumer.solved:
            consumer.solved = True
            left[0] -= 1
            if _is_product(home, consumer, args[0], out):
                _solve(home, consumer, x.flatten(0, -2), part)
            if not left[0]:
                raise _Enough
        if consumer.change is not None:
            out = out + x[..., keep] @ consumer.change.to(x.dtype)
        return out if consumer.shift is None else out + consumer.shift.to(out.dtype)

    return hook


def _matrix(home: nn.Module, consumer: _Consumer) -> Tensor:
    """The weight as (outputs, inputs): a view."""
    return home.get_parameter(consumer.leaf).movedim(consumer.axis, -1)


def _is_product(home: nn.Module, consumer: _Consumer, x: Tensor, out: Any) -> bool:
    """Whether a module does nothing but multiply its input by its weight, and add a bias."""
    some = x.flatten(0, -2)[:8] @ _matrix(home, consumer).T
    bias = home._parameters.get("bias")
    some = some if bias is None else some + bias
    if not isinstance(out, Tensor) or out.shape[-1:] != some.shape[-1:]:
        return False
    seen = out.flatten(0, -2)[:8]
    return float((some - seen).norm()) <= 1e-2 * float(seen.norm())


def _solve(home: nn.Module, consumer: _Consumer, x: Tensor, part: float) -> None:
    """Weighted ridge regression in float64; the ridge is chosen on the last rows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    keep, weight = consumer.keep.to(x.device), _matrix(home, consumer).to(x.dtype)
    size = (x @ weight.T).square().sum(1)
    c = (1 / (size + size.median()).clamp_min(1e-30))[:, None]
    inputs, gone = x[:, keep], x[:, ~keep] @ weight[:, ~keep].T
    cut = round(len(x) * part)
    centre, shift = torch.zeros_like(inputs[0]), torch.zeros_like(gone[0])
    biased = home._parameters.get("bias") is not None
    if biased:
        centre, shift = ((c * t)[:cut].sum(0) / c[:cut].sum() for t in (inputs, gone))
    root = c.sqrt()
    a, b = (inputs - centre) * root, (gone - shift) * root
    gram, cross = (a[:cut].T @ a[:cut]).double(), (a[:cut].T @ b[:cut]).double()
    gram_held, cross_held = (a[cut:].T @ a[cut:]).double(), (a[cut:].T @ b[cut:]).double()
    scale, eye = gram.diagonal().mean(), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Squared errors on held-in rows, less that of no change.
    mean = float(b[cut:].square().sum() - (gone * root)[cut:].square().sum())
    best, error = None, min(0.0, mean)
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * scale * eye)
        if int(failed):
            continue
        change = torch.cholesky_solve(cross, factor)
        found = mean + float((change * (gram_held @ change - 2 * cross_held)).sum())
        if found < error:
            best, error = change, found
    consumer.change = best
    if biased and error < 0:
        consumer.shift = shift if best is None else shift - centre @ best.to(centre.dtype)


def _solved(name: str, found: Sequence[_Consumer]) -> bool:
    path, _, leaf = name.rpartition(".")
    return any(path == c.path and leaf in (c.leaf, "bias") for c in found)


def _add(small: nn.Module, consumer: _Consumer, step: float) -> None:
    """Bring a part of a solution into the smaller model."""
    home = small.get_submodule(consumer.path)
    if consumer.change is not None:
        weight = _matrix(home, consumer)
        weight.add_(consumer.change.T.to(weight.dtype), alpha=step)
    if consumer.shift is not None:
        bias = home.get_parameter("bias")
        bias.add_(consumer.shift.to(bias.dtype), alpha=step)
