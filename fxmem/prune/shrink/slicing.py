"""Cut parameters along the axes that masks shrink, and the module around them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fxmem.plan.carry import left_behind
from fxmem.prune.units.masks import Masks, axis_keeps
from fxmem.prune.units.units import Coupling

Parts = dict[str, list[tuple[int, Tensor]]]


def slices(coupling: Coupling, masks: Masks) -> Parts:
    """Parameter name -> (axis, kept indices), only what is cut."""
    out: Parts = {}
    for (name, axis), keep in axis_keeps(coupling, masks).items():
        out.setdefault(name, []).append((axis, keep.nonzero()[:, 0]))
    return out


def cut(weight: Tensor, parts: list[tuple[int, Tensor]]) -> Tensor:
    """``weight`` with the kept indices of every cut axis, contiguous and in its own storage."""
    for axis, index in parts:
        weight = weight.index_select(axis, index.to(weight.device))
    return weight.contiguous()


def shell(model: nn.Module, parts: Parts, *, share: bool = False) -> nn.Module:
    """A deep copy of ``model`` whose parameters are cut; the dense ones are never copied whole.

    Ties, hooks, buffers, dtypes, ``requires_grad`` and the training flags come with the copy.
    ``share``: what is not cut keeps its storage.
    """
    memo: dict[int, Any] = dict(left_behind(model))
    for name, p in model.named_parameters():
        if name in parts:
            new = nn.Parameter(cut(p.detach(), parts[name]), requires_grad=p.requires_grad)
        elif share:
            new = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        else:
            continue
        new.__dict__.update(p.__dict__)
        memo[id(p)] = new
    small = copy.deepcopy(model, memo)
    resize(small)
    for p in small.parameters():
        p.grad = None
    return small


def resize(small: nn.Module) -> None:
    """Let torch's own modules repeat the sizes that their weights now have."""
    for module in small.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = weight.shape[1]
        elif isinstance(module, nn.RMSNorm):
            module.normalized_shape = tuple(weight.shape)
