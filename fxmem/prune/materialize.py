"""Masked models (the oracle) and really smaller ones."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import MaskError
from fxmem.prune.coupling import coupling as couple
from fxmem.prune.masks import Masks, axis_keeps, consumer_keeps
from fxmem.prune.units import Coupling


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks, coupling: Coupling | None = None) -> Iterator[nn.Module]:
    """Inside the context ``model`` runs with removed units multiplied by zero.

    The zero meets the unit at the input of its consumer; ``W (m * x) = (W diag m) x``, so the
    consumer's weight is masked along its contracted axis, out of place: gradients reach ``W``.
    """
    plan = couple(model) if coupling is None else coupling
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for (name, axis), keep in consumer_keeps(plan, masks).items():
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            weight = getattr(owner, leaf)
            shape = [1] * weight.dim()
            shape[axis] = -1
            if isinstance(weight, nn.Parameter):
                swapped.append((owner, leaf, weight))
                del owner._parameters[leaf]
            setattr(owner, leaf, weight * keep.to(weight).view(shape))
        yield model
    finally:
        for owner, leaf, weight in reversed(swapped):
            delattr(owner, leaf)
            owner.register_parameter(leaf, weight)


def slices(coupling: Coupling, masks: Masks) -> dict[str, list[tuple[int, Tensor]]]:
    """Parameter name -> (axis, kept indices), only what is cut."""
    out: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, axis), keep in axis_keeps(coupling, masks).items():
        out.setdefault(name, []).append((axis, keep.nonzero()[:, 0]))
    return out


def cut(weight: Tensor, parts: list[tuple[int, Tensor]]) -> Tensor:
    for axis, index in parts:
        weight = weight.index_select(axis, index.to(weight.device))
    return weight.contiguous()


def materialize(model: nn.Module, masks: Masks, coupling: Coupling | None = None) -> nn.Module:
    """A smaller model with its own contiguous storage; ``model`` is untouched.

    Integer attributes that hold a size are found by trial: the smallest set whose change makes the
    smaller model equal the masked one on a small input. No set does: the model is refused.

    Raises:
        MaskError: masks of another model, or no consistent sizes.
    """
    plan = couple(model) if coupling is None else coupling
    memo: dict[int, Any] = {}
    parts = slices(plan, masks)
    for name, p in model.named_parameters():
        if name in parts:
            new = nn.Parameter(cut(p.detach(), parts[name]), requires_grad=p.requires_grad)
            memo[id(p)] = new
    small = copy.deepcopy(model, memo)
    if parts:
        _settle(model, small, plan, masks)
    return small


def _candidates(small: nn.Module, plan: Coupling, masks: Masks) -> dict[Any, list[Any]]:
    """(module class, attribute) -> [(module, attribute, new value)]; sizes that follow a group."""
    found: dict[Any, list[Any]] = {}
    for g in plan.groups:
        kept = len(masks.kept(g.name))
        if kept == g.size:
            continue
        paths = [n.split(".")[:-1] for n, _, _ in g.members]
        shared = 0
        while all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
            shared += 1
        owners = {".".join(p[:k]) for p in paths for k in range(shared, len(p) + 1)}
        for path in sorted(owners):
            module = small.get_submodule(path)
            for key, value in vars(module).items():
                if type(value) is not int or key == "layer_idx":
                    continue
                for factor in g.sizes:
                    if value == g.size * factor:
                        entry = (module, key, kept * factor)
                        role = path.rpartition(".")[2]
                        found.setdefault((type(module), role, key), []).append(entry)
                        break
    return found


def _settle(model: nn.Module, small: nn.Module, plan: Coupling, masks: Masks) -> None:
    found = _candidates(small, plan, masks)
    keys = sorted(found, key=str)
    before = {k: [(m, a, getattr(m, a)) for m, a, _ in found[k]] for k in keys}
    device = next(model.parameters()).device
    inputs = [torch.arange(2 * n, device=device).view(2, n) % 31 + 2 for n in (7, 8)]
    was = model.training
    model.eval()
    small.eval()
    with torch.no_grad():
        with masked(model, masks, plan):
            wanted = [model(input_ids=x, use_cache=False).logits for x in inputs]
        good = None
        for count in range(len(keys) + 1):
            for chosen in combinations(keys, count):
                for k in keys:
                    for m, a, v in found[k] if k in chosen else before[k]:
                        setattr(m, a, v)
                if _agrees(small, inputs, wanted):
                    good = chosen
                    break
            if good is not None:
                break
    model.train(was)
    for new, old in zip(small.modules(), model.modules(), strict=True):
        new.training = old.training
    if good is None:
        raise MaskError("no choice of size attributes makes the smaller model equal the masked one")


def _agrees(small: nn.Module, inputs: list[Tensor], wanted: list[Tensor]) -> bool:
    for x, want in zip(inputs, wanted, strict=True):
        try:
            got = small(input_ids=x, use_cache=False).logits
        except (RuntimeError, ValueError, IndexError):
            return False
        scale = want.abs().max().clamp_min(1e-30)
        limit = torch.finfo(want.dtype).eps ** 0.75 * 10
        if not bool((got - want).abs().max() / scale <= limit):
            return False
    return True
