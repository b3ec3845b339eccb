"""Probes of the private names behind sizes that stay symbols and sizes that are fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxmem._compat import fixed_sizes, graph
from fxmem._compat.dynamo_gaps import answered


def test_the_value_of_a_size_is_not_given() -> None:
    def loops(x: Tensor) -> Tensor:
        return torch.stack([x[i] for i in range(x.shape[0])])

    with fixed_sizes.keep_symbolic({5}):
        x = torch.randn(5)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        with graph.capture_config(), pytest.raises(Exception, match="the value of a size"):
            torch.compile(loops, backend="eager", fullgraph=True)(x)
        assert fixed_sizes.demanded()
        with fixed_sizes.keep_symbolic(set()):
            x = torch.randn(5)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            assert torch.equal(torch.compile(loops, backend="eager", fullgraph=True)(x), x)
    x = torch.randn(7)
    assert torch.equal(torch.compile(loops, backend="eager", fullgraph=True)(x), x)


def tangled(x: Tensor, axis: int, times: int) -> Tensor:
    """A size that is padded to whole windows again and again."""
    n: Any = x.shape[axis]
    for by in range(2, 2 + times):
        n = (n + (by - n % by) % by) // by + n // (by + 1)
    return x * n


@pytest.mark.parametrize(
    ("shape", "axis", "times", "kept", "fixed"),
    [
        ((2, 3, 30, 40), 2, 4, set(), True),
        ((2, 3, 30, 40), 3, 4, {2, 3}, True),
        ((2, 3, 30, 40), 3, 1, set(), False),  # few terms
        ((20, 3, 30, 40), 0, 4, set(), False),  # a batch
        ((2, 3, 30, 40), 2, 4, {30}, False),  # the length
        ((2, 30, 4), 1, 4, set(), False),  # states
    ],
)
def test_sizes_of_pictures_are_fixed_where_their_terms_are_many(
    shape: tuple[int, ...], axis: int, times: int, kept: set[int], fixed: bool
) -> None:
    sizes: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            value = node.meta["example_value"]
            sizes.extend(value.shape if isinstance(value, Tensor) else [])
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(shape)
    for d in range(x.dim()):
        torch._dynamo.maybe_mark_dynamic(x, d)
    with graph.capture_config(), answered(), fixed_sizes.keep_symbolic(kept):
        got = torch.compile(tangled, backend=backend, fullgraph=True)(x, axis, times)
    assert torch.equal(got, tangled(x, axis, times))
    known = [isinstance(s, int) or s.node.expr.is_number for s in sizes]
    assert known == [fixed and d == axis for d in range(x.dim())]
