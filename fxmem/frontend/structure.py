"""Nested Python values as plain descriptions: what a method returns, apart from its tensors.

A description is made of tuples, so that it can be compared, and a capture can read it as constants.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_CONSTANTS = (
    int, float, bool, str, complex, torch.dtype, torch.device, torch.Size, enum.Enum, type(None),
)  # fmt: skip


class IrregularError(Exception):
    """A value that is neither a tensor nor a constant nor a plain container of them."""


def describe(value: Any, tensors: list[Tensor]) -> Any:
    """What ``value`` is; its tensors are appended to ``tensors``.

    Raises:
        IrregularError: there is something else in it.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return ("tensor", len(tensors) - 1)
    if isinstance(value, _CONSTANTS):
        return ("constant", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        return ("fields", type(value), _pairs(fields, lambda n: getattr(value, n), tensors))
    if type(value) is dict:
        return ("dict", None, _pairs(list(value), value.__getitem__, tensors))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ("fields", type(value), _pairs(value._fields, lambda n: getattr(value, n), tensors))
    if type(value) in (list, tuple):
        return (type(value).__name__, None, tuple(describe(v, tensors) for v in value))
    raise IrregularError(f"a value of type {type(value).__name__}")


def _pairs(
    names: Sequence[Any], read: Callable[[Any], Any], tensors: list[Tensor]
) -> tuple[tuple[Any, Any], ...]:
    return tuple((name, describe(read(name), tensors)) for name in names)


def rebuild(description: Any, tensors: Sequence[Tensor]) -> Any:
    """The value of a description."""
    kind, what = description[0], description[1]
    if kind == "tensor":
        return tensors[what]
    if kind == "constant":
        return what
    parts = description[2]
    if kind == "fields":
        return what(**{name: rebuild(part, tensors) for name, part in parts})
    if kind == "dict":
        return {name: rebuild(part, tensors) for name, part in parts}
    items = [rebuild(part, tensors) for part in parts]
    return tuple(items) if kind == "tuple" else items


__all__ = ["IrregularError", "describe", "rebuild"]
