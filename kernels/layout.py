"""What kernels ask of the layout of their operands."""

from __future__ import annotations

from torch import Tensor


def rows_last(x: Tensor) -> Tensor:
    """``x`` with unit stride in its last dimension, which kernels rely on without a look.

    So does PyTorch's fused attention on the CPU, which only its dispatcher checks.
    """
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()
