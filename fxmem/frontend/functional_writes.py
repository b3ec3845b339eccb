"""Functions that passes put into the captured graph.

Writes in place, as functions of values, copy, write to the copy and return it. The trace of a
region turns that into plain ATen ops (``slice_scatter`` and the like), so no copy is made for the
sake of the write alone.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def written(x: Tensor, method: str, *args: Any, **kwargs: Any) -> Tensor:
    """``x`` as it would be after ``x.method(*args, **kwargs)``, an in-place method."""
    y = x.clone()
    getattr(y, method)(*args, **kwargs)
    return y


def filled(out: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """What ``out`` holds after ``torch.name(*args, out=out, **kwargs)``."""
    result: Tensor = _function(name)(*args, **kwargs)
    return result.to(out.dtype)


def assigned(base: Tensor, value: Tensor, steps: Sequence[tuple[str, Any, Any]]) -> Tensor:
    """``base`` with ``value`` in place of the view that ``steps`` lead to.

    ``steps``: (name of :func:`view_name`, arguments, keyword arguments), from the base on.
    """
    y = base.clone()
    view: Any = y
    for name, args, kwargs in steps:
        view = _function(name)(view, *args, **kwargs)
    view.copy_(value)
    return y


def selected_log_probs(logits: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``log_softmax(logits [..., V])`` in ``dtype``, at one ``index [..., 1]`` per row."""
    return logits.log_softmax(-1, dtype).gather(-1, index)


def view_name(op: str, target: Any) -> str | None:
    """A name that stands for a view op in :func:`assigned`; None where there is none."""
    if op == "call_method":
        return f"Tensor.{target}" if hasattr(Tensor, str(target)) else None
    if target in (operator.getitem, getattr):
        return "getitem" if target is operator.getitem else "getattr"
    name = getattr(target, "__name__", "")
    return f"torch.{name}" if name and getattr(torch, name, None) is target else None


def _function(name: str) -> Any:
    if name in ("getitem", "getattr"):
        return operator.getitem if name == "getitem" else getattr
    owner, _, attribute = name.partition(".")
    return getattr(Tensor if owner == "Tensor" else torch, attribute)
