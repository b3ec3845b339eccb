"""Cut parameters along the axes that masks shrink, and the module around them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxmem.plan.carry import left_behind
from fxmem.prune.units.masks import Masks, axis_keeps, buffer_keeps
from fxmem.prune.units.units import Coupling

Parts = dict[str, list[tuple[int, Tensor]]]


def slices(coupling: Coupling, masks: Masks) -> Parts:
    """Parameter name -> (axis, kept indices), only what is cut."""
    return _parts(axis_keeps(coupling, masks))


def buffer_slices(coupling: Coupling, masks: Masks) -> Parts:
    """As `slices`, of buffers."""
    return _parts(buffer_keeps(coupling, masks))


def _parts(keeps: Mapping[tuple[str, int], Tensor]) -> Parts:
    out: Parts = {}
    for (name, axis), keep in keeps.items():
        out.setdefault(name, []).append((axis, keep.nonzero()[:, 0]))
    return out


def cut(weight: Tensor, parts: list[tuple[int, Tensor]]) -> Tensor:
    """``weight`` with the kept indices of every cut axis, contiguous and in its own storage."""
    for axis, index in parts:
        weight = weight.index_select(axis, index.to(weight.device))
    return weight.contiguous()


def shell(model: nn.Module, parts: Parts, buffers: Parts, *, share: bool = False) -> nn.Module:
    """A deep copy of ``model`` whose tensors are cut; the dense ones are never copied whole.

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
    for name, b in model.named_buffers():
        if name in buffers:
            memo[id(b)] = cut(b, buffers[name])
    small = copy.deepcopy(model, memo)
    resize(small)
    for p in small.parameters():
        p.grad = None
    return small


def resize(small: nn.Module) -> None:
    """Let torch's own modules repeat the sizes that their weights now have."""
    for module in small.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _NORMS):
            _recount(module)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = weight.shape[1]
        elif isinstance(module, nn.RMSNorm):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(weight)
        elif isinstance(module, _CONVOLUTIONS):
            _regroup(module)


_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm,
)  # fmt: skip
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def _recount(module: Any) -> None:
    """Of a norm with numbers per channel; groups keep their width."""
    held = module.weight if module.weight is not None else getattr(module, "running_mean", None)
    if held is None:
        return
    if isinstance(module, nn.GroupNorm):
        module.num_groups = len(held) // (module.num_channels // module.num_groups)
        module.num_channels = len(held)
    else:
        module.num_features = len(held)


def _regroup(conv: Any) -> None:
    """Channels and groups of a convolution; groups keep their channels in and out."""
    first, second = conv.weight.shape[:2]
    if conv.groups > 1:
        whole = conv.in_channels if conv.transposed else conv.out_channels
        conv.groups = first // (whole // conv.groups)
    ins, outs = first, second * conv.groups
    conv.in_channels, conv.out_channels = (ins, outs) if conv.transposed else (outs, ins)
