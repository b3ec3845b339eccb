"""Private names of torch for tensors that are made of others: quantised weights, say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["described", "is_wrapped", "parts", "together"]


def is_wrapped(value: Any) -> bool:
    """A tensor that is made of others and says how."""
    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def parts(value: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that ``value`` is made of."""
    if not is_wrapped(value):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts(getattr(value, name))]


def described(value: torch.Tensor) -> str:
    """How ``value`` is made of its parts, without what these are."""
    if not is_wrapped(value):
        return "plain"
    names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: described(getattr(value, name)) for name in names}
    return f"{type(value)} {context!r} {inner}"


def together(like: torch.Tensor, given: Sequence[torch.Tensor]) -> torch.Tensor:
    """A tensor of the kind of ``like`` of other parts."""
    made, rest = _together(like, list(given))
    assert not rest
    return made


def _together(like: torch.Tensor, given: list[torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
    if not is_wrapped(like):
        return given[0], given[1:]
    names, context = like.__tensor_flatten__()  # type: ignore[attr-defined]
    inner: dict[str, torch.Tensor] = {}
    for name in names:
        inner[name], given = _together(getattr(like, name), given)
    size, stride = like.size(), like.stride()
    return type(like).__tensor_unflatten__(inner, context, size, stride), given  # type: ignore[attr-defined]
