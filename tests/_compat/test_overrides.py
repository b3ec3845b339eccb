"""Tensors that answer for themselves: one small check per private name that they need."""

from __future__ import annotations

from typing import Any

import torch

from fxmem._compat import overrides


class Asked(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "asked"


def test_plainly_nobody_is_asked() -> None:
    x = torch.ones(2).as_subclass(Asked)
    assert torch.sin(x) == "asked"
    with overrides.plainly():
        assert isinstance(torch.sin(x), torch.Tensor)


def test_the_edge_is_autograds() -> None:
    x = torch.ones(2, requires_grad=True)
    y = (x * 2).as_subclass(Asked)
    assert y.grad_fn == "asked"
    assert "Backward" in overrides.edge(y).name() and overrides.edge(x) is None


def test_writes_in_place_are_counted() -> None:
    x = torch.ones(2)
    before = overrides.version(x)
    x.add_(1)
    x[:1].zero_()
    assert overrides.version(x) == before + 2


def test_a_new_edge_is_no_write() -> None:
    x, y = torch.ones(2, requires_grad=True) * 1, torch.ones(2, requires_grad=True)
    before = overrides.version(x)
    with overrides.unchanged(x):
        x.detach_()
        x.copy_(y)
    assert overrides.version(x) == before and "Copy" in overrides.edge(x).name()


def test_autocast_as_it_is() -> None:
    assert overrides.autocasts() == ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert overrides.autocasts() == (("cpu", torch.bfloat16, True),)


def test_trees() -> None:
    assert overrides.tree_map(lambda v: v + 1, ({"a": [1]}, 2)) == ({"a": [2]}, 3)
    assert overrides.tree_leaves({"a": [1, (2,)]}) == [1, 2]
