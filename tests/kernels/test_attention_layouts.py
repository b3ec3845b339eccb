"""Attention of operands that lie in any order of dimensions: a fused kernel reads rows, whatever
the strides say, and only PyTorch's own dispatcher looks first.
"""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxmem.kernels.attention import attention

ORDERS = st.sampled_from(list(permutations(range(4))))


def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values; the dimensions lie in ``order``, outermost first."""
    back = [order.index(d) for d in range(4)]
    return x.permute(order).contiguous().permute(back)


@given(
    orders=st.lists(ORDERS, min_size=5, max_size=5), heads=st.sampled_from([(2, 2), (4, 2)]),
    tokens=st.sampled_from([(5, 5), (3, 7)]), width=st.sampled_from([1, 4, 8]),
    mask=st.sampled_from(["none", "causal", "bool", "additive"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_layout_gives_what_a_plain_one_gives(
    orders: list[tuple[int, ...]], heads: tuple[int, int], tokens: tuple[int, int], width: int,
    mask: str,
) -> None:  # fmt: skip
    (h, g), (c, s) = heads, tokens
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    given_ = [made(2, h, c, width), made(2, g, s, width), made(2, g, s, width)]
    dout, seen = made(2, h, c, width), made(2, 1, c, s)
    bias = {"bool": seen > -1, "additive": seen}.get(mask)
    results = []
    for lay in (lambda x, order: x, laid_out):
        q, k, v = (
            lay(x, o).detach().requires_grad_() for x, o in zip(given_, orders, strict=False)
        )
        shown = None if bias is None else lay(bias, orders[3])
        out, lse = attention(q, k, v, shown, mask == "causal", width**-0.5)
        grads = torch.autograd.grad(out, (q, k, v), lay(dout, orders[4]))
        results.append((out, lse, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 0, 1, 2)])
def test_plain_layouts_give_what_pytorch_gives(order: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(2, 2, 6, 4, dtype=torch.double) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got, _ = attention(*(laid_out(x, order) for x in (q, k, v)), None, True, 0.5)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
