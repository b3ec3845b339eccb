"""Private names of torch for ``requires_grad``: whether code that Dynamo captures asks for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch._dynamo.variables.tensor import TensorVariable

__all__ = ["METHODS", "reads"]

METHODS = (
    "method_attr_requires_grad", "method_attr_grad_fn", "method_attr_grad", "method_requires_grad_",
)  # fmt: skip
"""How Dynamo answers code that asks whether a tensor learns, or changes that."""
_READS: ContextVar[list[str] | None] = ContextVar("reads of requires_grad", default=None)


@functools.cache
def _watch() -> None:
    for name in METHODS:
        plain = getattr(TensorVariable, name)

        def noted(*args: Any, _name: str = name, _plain: Any = plain, **kwargs: Any) -> Any:
            if (found := _READS.get()) is not None:
                found.append(_name)
            return _plain(*args, **kwargs)

        setattr(TensorVariable, name, noted)


@contextlib.contextmanager
def reads() -> Iterator[list[str]]:
    """The list that is given fills with what captures inside the context ask for."""
    _watch()
    found: list[str] = []
    token = _READS.set(found)
    try:
        yield found
    finally:
        _READS.reset(token)
