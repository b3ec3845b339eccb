"""Updates inside the backward by the kernel that forms the gradient and moves the weight in one
pass, where the plan's way of running kernels and the device allow it.

The gradient is never stored. A bfloat16 weight is rounded with the same random bits as without the
kernel, so which of the two moved it shows in the order of floating-point sums alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmem.kernels.registry import find

Uses = Callable[[str, torch.device, torch.dtype], bool]
"""Whether a kernel runs, by name, device and dtype:
:meth:`fxmem.backends.lowering.Lowering.uses`.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """``weight -= rate * gradient``, or its sign; ``key`` is that of stochastic rounding."""

    rate: float
    sign: bool
    key: int


def move(weight: Tensor, a: Tensor, b: Tensor, rule: Rule) -> bool:
    """Move ``weight [O, I]`` by its gradient ``a @ b``; False where the kernel does not take it."""
    if weight.dim() != 2 or a.dtype != b.dtype or weight.stride(1) != 1:
        return False
    find("weight_update").launch(
        weight, a.t(), b, lr=rule.rate, rule="sign" if rule.sign else "sgd", key=rule.key
    )
    return True


__all__ = ["Rule", "Uses", "move"]
