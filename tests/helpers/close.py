"""Comparison of results in float32 or float16 against float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the largest element. float16 rounds operands of products to 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2**-7, torch.float64: 1e-10}


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Every element within the dtype's tolerance of the largest one of ``want``, at least 1."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    got, want = got.detach(), want.detach()
    if not want.numel():
        return
    worst = float((got.double() - want.double()).abs().max())
    bound = TOLERANCE[dtype] * max(1.0, float(want.abs().max()))
    assert worst <= bound, f"{what}: {worst:.2e} > {bound:.2e}"


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that the dtype holds."""
    return torch.randn(*shape).to(dtype)


def leaf(x: Tensor | None) -> Tensor | None:
    """A float64 leaf with the same values."""
    return None if x is None else x.detach().double().requires_grad_()
