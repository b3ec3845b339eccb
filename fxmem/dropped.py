"""A stand-in for an output that was never made whole: it has a shape, a dtype and no values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxmem import _compat
from fxmem.errors import DroppedLogitsError
from fxmem.sizes import Size, evaluate_shape


class DroppedTensor(torch.Tensor):
    """Any operation on it raises :class:`~fxmem.errors.DroppedLogitsError`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as an instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise _error(str(func))

    def tolist(self) -> Any:
        # torch itself refuses these two for any subclass, before an op is dispatched
        raise _error("tolist")

    def numpy(self, *, force: bool = False) -> Any:
        raise _error("numpy")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DroppedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def _error(op: str) -> DroppedLogitsError:
    return DroppedLogitsError("the logits of a streamed training step were asked for", op=op)


def dropped(
    shape: Sequence[Size], sizes: dict[str, int], dtype: torch.dtype, device: torch.device
) -> DroppedTensor:
    """A stand-in of the given symbolic shape."""
    return _compat.wrapper_tensor(DroppedTensor, evaluate_shape(shape, sizes), dtype, device)
