"""Private names of torch around tensors that answer for themselves."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "DATA",
    "autocasts",
    "edge",
    "plainly",
    "tree_leaves",
    "tree_map",
    "unchanged",
    "version",
]

DATA: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
"""What a captured graph calls for ``x.data``."""


def plainly() -> contextlib.AbstractContextManager[Any]:
    """Within it no tensor's ``__torch_function__`` is asked."""
    manager: contextlib.AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return manager


def edge(tensor: torch.Tensor) -> Any:
    """The node of autograd's graph that has made a tensor, whatever its class says."""
    with plainly():
        return tensor.grad_fn


def version(tensor: torch.Tensor) -> int:
    """How often a tensor has been written to in place."""
    return 0 if tensor.is_inference() else tensor._version  # made in inference_mode


def unchanged(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Writes inside are not counted."""
    manager: contextlib.AbstractContextManager[Any] = (
        torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor)
    )
    return manager


def autocasts() -> tuple[tuple[str, torch.dtype, bool], ...]:
    """Autocast as it is now: device, dtype, enabled."""
    devices = dict.fromkeys(("cpu", torch._C._get_accelerator().type))
    return tuple(
        (d, torch.get_autocast_dtype(d), True) for d in devices if torch.is_autocast_enabled(d)
    )
