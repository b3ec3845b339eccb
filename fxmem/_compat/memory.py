"""The private names of torch that the memory estimate uses; see :mod:`fxmem._compat.graph`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageWatch"]


class StorageWatch(TorchDispatchMode):
    """Counts the bytes of storages that ops make while it is active, and when they die.

    Meant for fake tensors: the code runs, nothing is computed or allocated. ``inside(op, args)``
    adds what an op allocates and frees within itself.
    """

    def __init__(self, inside: Callable[[Any, Sequence[Any]], int] | None = None) -> None:
        super().__init__()
        # a storage keeps its Python object, so these call as it dies: nobody has to ask them all
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._external: set[int] = set()
        self._inside = inside
        self.live = 0
        """Bytes alive now."""
        self.peak = 0

    def ignore(self, tensors: Sequence[Any]) -> None:
        """Storages that were there before."""
        self._external.update(_key(t) for t in tensors if isinstance(t, torch.Tensor))

    def came(self, key: int, size: int) -> None:
        """An op has made a storage."""
        self.live += size

    def gone(self, key: int, ref: Any = None) -> None:
        """A storage has died."""
        self.live -= self._storages.pop(key)[1]

    def owner(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Identity and bytes of a tensor's storage; 0 bytes where it was there before."""
        key = _key(tensor)
        return key, self._storages[key][1] if key in self._storages else 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except DynamicOutputShapeException:
            if func is not torch.ops.aten.index.Tensor:
                raise
            result = _largest(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                key = _key(leaf)
                if key not in self._external and key not in self._storages:
                    storage = leaf.untyped_storage()
                    size = storage.nbytes()
                    self._storages[key] = weakref.ref(storage, partial(self.gone, key)), size
                    self.came(key, size)
        inner = self._inside(func, args) if self._inside is not None else 0
        self.peak = max(self.peak, self.live + inner)
        return result


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _largest(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An op that indexes by a mask, whose size depends on values, if every element is set."""
    source, indices, *rest = args
    chosen: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            every = index.new_empty(index.numel(), dtype=torch.int64)
            chosen += [every] * index.dim()
        else:
            chosen.append(index)
    return func(source, chosen, *rest, **kwargs)
