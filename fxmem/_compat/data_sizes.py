"""Private names of torch for sizes that are values of a tensor (the rows that a mask takes)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

__all__ = ["by_data", "evaluating"]


def by_data(value: Any) -> bool:
    """A number that is the value of a tensor, or a tensor with such a size."""
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, kinds) and bool(free_unbacked_symbols(value))


@contextlib.contextmanager
def evaluating(mode: FakeTensorMode | None) -> Iterator[None]:
    """Ops on fake tensors outside a trace: such sizes have new names that belong to no graph."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(enable_python_dispatcher())
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield
