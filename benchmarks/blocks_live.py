"""Bytes of gradients and optimizer state that are alive together, observed and not computed."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxmem._compat.graph import is_transformed


class LiveGradients(TorchDispatchMode):
    """Follows every tensor with the shape of a parameter, or of its transpose, while it is active.

    So gradients, optimizer state and the temporaries of updates count alike; so does what was made
    between the construction and the start of the mode. ``peak`` is the most bytes alive at once.

    Args:
        parameters: their own storage does not count.
        state: counts from the start; nothing else that exists at the construction does.
    """

    def __init__(self, parameters: Iterable[Tensor], state: Iterable[Tensor] = ()) -> None:
        super().__init__()
        own, kept = list(parameters), {t.untyped_storage()._cdata for t in state}
        self.shapes = {tuple(p.shape) for p in own} | {tuple(p.shape)[::-1] for p in own}
        # the references keep an address from being used again
        self._before = [t.untyped_storage() for t in [*own, *_tensors()]]
        self._known = {s._cdata for s in self._before} - kept
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __enter__(self) -> LiveGradients:
        for value in _tensors():
            self._see(value)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._before.clear()
        super().__exit__(*error)

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


def _tensors() -> list[Tensor]:
    return [
        t for t in gc.get_objects()
        if type(t) is Tensor and t.device.type != "meta" and t.layout is torch.strided
        and not is_transformed(t)  # what a vmap left behind has no storage
    ]  # fmt: skip


def bound(parameters: dict[str, Tensor], active: Iterable[str], inactive: Iterable[str]) -> int:
    """Gradient, two moments of the active block, and the largest inactive gradient, in bytes."""
    own = sum(parameters[n].nbytes for n in active)
    return 3 * own + max((parameters[n].nbytes for n in inactive), default=0)


__all__ = ["LiveGradients", "bound"]
