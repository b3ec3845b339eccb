"""The private names of torch that the memory estimate uses; see :mod:`fxmem._compat.graph`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
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
            if func not in _LARGEST:
                raise
            result = _LARGEST[func](*args, **(kwargs or {}))
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


def _masked(source: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    chosen: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            every = index.new_empty(index.numel(), dtype=torch.int64)
            chosen += [every] * index.dim()
        else:
            chosen.append(index)
    return torch.ops.aten.index.Tensor(source, chosen)


def _selected(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(math.prod(torch.broadcast_shapes(x.shape, mask.shape)))


def _nonzero(x: Tensor) -> Tensor:
    return x.new_empty((x.numel(), x.dim()), dtype=torch.int64)


def _counted(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    rows = minlength or x.numel()
    if weights is None:
        return x.new_empty(rows, dtype=torch.int64)
    single = weights.dtype == torch.float32
    return weights.new_empty(rows, dtype=torch.float32 if single else torch.float64)


def _repeated(repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    return repeats.new_empty(repeats.numel() if output_size is None else output_size)


def _unique(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    count = x.numel()
    return x.new_empty(count), *(x.new_empty(s, dtype=torch.int64) for s in (x.shape, count))


def _unique_along(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    rows = x.shape[dim]
    return x.new_empty(x.shape), *(x.new_empty(rows, dtype=torch.int64) for _ in range(2))


def _consecutive(
    x: Tensor, inverse: bool = False, counts: bool = False, dim: int | None = None
) -> tuple[Tensor, ...]:
    return _unique(x) if dim is None else _unique_along(x, dim)


_LARGEST: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.index.Tensor: _masked,
    torch.ops.aten.masked_select.default: _selected,
    torch.ops.aten.nonzero.default: _nonzero,
    torch.ops.aten.bincount.default: _counted,
    torch.ops.aten.repeat_interleave.Tensor: _repeated,
    torch.ops.aten._unique2.default: _unique,
    torch.ops.aten._unique.default: lambda *args, **kwargs: _unique(*args, **kwargs)[:2],
    torch.ops.aten.unique_dim.default: lambda x, dim, *_, **__: _unique_along(x, dim),
    torch.ops.aten.unique_consecutive.default: _consecutive,
}
"""What ops give whose sizes depend on values, if all elements count, and all differ."""
