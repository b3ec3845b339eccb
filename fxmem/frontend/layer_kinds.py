"""Which layers of a model may share one trace: modules beside each other, alike in structure.

Alike are classes, submodules, and the shapes and flags of parameters and buffers; numbers and
strings are for Dynamo's guards to compare. Any other object that a layer holds must be the same one
in both. Hooks, tensors outside of parameters and buffers, and what a layer shares with other parts
of the model keep it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PRIMITIVE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
_HELD = ("_parameters", "_buffers", "_modules")


def layer_kinds(model: nn.Module) -> dict[int, Hashable]:
    """By ``id`` of the outermost such modules, what is equal for those that may share a trace."""
    owned = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owned += Counter(id(t) for m in model.modules() for _, t in _tensors(m))
    found: dict[int, Hashable] = {}

    def visit(module: nn.Module) -> None:
        kinds = {
            child: kind for child in module.children()
            if next(child.children(), None) is not None and not _is_container(child)
            and (kind := _kind(child, owned)) is not None
        }  # fmt: skip
        count = Counter(kinds.values())
        for child in module.children():
            if count[kinds.get(child)] > 1:
                found[id(child)] = kinds[child]
            else:
                visit(child)

    visit(model)
    return found


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward or isinstance(module, nn.Sequential)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for held in (module._parameters, module._buffers):
        yield from ((name, t) for name, t in held.items() if t is not None)


def _kind(layer: nn.Module, owned: Counter[int]) -> Hashable | None:
    """None where it must be traced on its own."""
    parts: list[Hashable] = []
    for path, module in layer.named_modules(remove_duplicate=False):
        if owned[id(module)] > 1 or any(owned[id(t)] > 1 for _, t in _tensors(module)):
            return None
        parts.append((path, type(module)))
        for name, tensor in _tensors(module):
            place = (tensor.dtype, tensor.device, tensor.layout)
            parts.append((name, type(tensor), tuple(tensor.shape), tensor.requires_grad, *place))
        for name, value in vars(module).items():
            if name in _HELD:
                continue
            if name.endswith("_hooks") or "_hooks_" in name:
                if value:
                    return None
            elif (held := _attribute(value)) is None:
                return None
            else:
                parts.append((name, held))
    return tuple(parts)


def _attribute(value: Any) -> int | None:
    """What an attribute of two layers must have in common; None where a tensor is in it."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, _PRIMITIVE):
        return id(type(value))
    if type(value) in (tuple, list, set, frozenset, dict):
        inner = list(value.values()) if isinstance(value, dict) else list(value)
        if any(isinstance(v, Tensor) for v in inner):
            return None
        if all(isinstance(v, _PRIMITIVE) for v in inner):
            return id(type(value))
    return id(value)
