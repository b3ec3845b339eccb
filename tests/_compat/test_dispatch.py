"""Probe: autograd records inside an operator's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmem._compat.dispatch import recorded


@torch.library.custom_op("fxmem_tests::slope", mutates_args=())
def slope(x: Tensor) -> Tensor:
    """The derivative of a square, by autograd."""
    with recorded():
        y = x.detach().requires_grad_()
        (found,) = torch.autograd.grad((y * y).sum(), y)
    return found


def test_autograd_inside_an_operator() -> None:
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    assert torch.equal(slope(x), 2 * x.detach())
    with torch.no_grad(), recorded():
        assert (x * x).requires_grad
    with torch.no_grad():
        assert not (x * x).requires_grad
