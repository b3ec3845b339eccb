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
        raise DroppedLogitsError(
            "the logits of a streamed training step were asked for", op=str(func)
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DroppedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def dropped(
    shape: Sequence[Size], sizes: dict[str, int], dtype: torch.dtype, device: torch.device
) -> DroppedTensor:
    """A stand-in of the given symbolic shape."""
    return _compat.wrapper_tensor(DroppedTensor, evaluate_shape(shape, sizes), dtype, device)
