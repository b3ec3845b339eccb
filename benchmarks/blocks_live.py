"""Bytes of gradients and optimizer state that are alive together, observed and not computed."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveGradients(TorchDispatchMode):
    """Follows every tensor with the shape of a parameter, or of its transpose, while it is active.

    So gradients, optimizer state and the temporaries of updates count alike; what exists when it
    is entered counts too. ``peak`` is the most bytes alive at once.

    Args:
        parameters: their own storage does not count.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        own = list(parameters)
        self.shapes = {tuple(p.shape) for p in own} | {tuple(p.shape)[::-1] for p in own}
        self._known = {p.untyped_storage()._cdata for p in own}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __enter__(self) -> LiveGradients:
        for value in gc.get_objects():
            if type(value) is Tensor:
                self._see(value)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out

    def _see(self, value: Tensor) -> None:
        if not value.is_floating_point() or tuple(value.shape) not in self.shapes:
            return
        if value.device.type == "meta" or type(value) is not Tensor:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        entry = self._alive.get(key)
        if entry is not None and not entry[0].expired():
            return
        self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: e for k, e in self._alive.items() if not e[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def bound(parameters: dict[str, Tensor], active: Iterable[str], inactive: Iterable[str]) -> int:
    """Gradient, two moments of the active block, and the largest inactive gradient, in bytes."""
    own = sum(parameters[n].nbytes for n in active)
    return 3 * own + max((parameters[n].nbytes for n in inactive), default=0)


__all__ = ["LiveGradients", "bound"]
