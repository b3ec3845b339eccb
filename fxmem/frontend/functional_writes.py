"""Functions that passes put into the captured graph.

Writes in place, as functions of values, copy, write to the copy and return it. The trace of a
region turns that into plain ATen ops (``slice_scatter`` and the like), so no copy is made for the
sake of the write alone.

What a model writes to a tensor that it holds, such as a buffer, is a value in the regions, and is
written to the tensor between them: before a piece that runs as it is, and at the end.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat.overrides import DATA
from fxmem.frontend.attributes import put_back

_LOCAL = threading.local()


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
    view_of(y, steps).copy_(value)
    return y


def view_of(base: Tensor, steps: Sequence[tuple[str, Any, Any]]) -> Any:
    """The view of ``base`` itself that ``steps`` lead to."""
    view: Any = base
    for name, args, kwargs in steps:
        view = _function(name)(view, *args, **kwargs)
    return view


def written_back(held: Tensor, value: Tensor, read_again: Sequence[Tensor] = ()) -> None:
    """Write ``value``, what ``held`` holds by now, to it. ``read_again``: names of its memory that
    are read after this as they are then.
    """
    if (log := getattr(_LOCAL, "log", None)) is not None:
        log.append((held, held.clone()))
    with torch.no_grad():
        held.copy_(value)


@contextlib.contextmanager
def undoable() -> Iterator[Callable[[], None]]:
    """Gives what takes back the writes of this thread within it, the latest first."""
    before = getattr(_LOCAL, "log", None)
    log: list[tuple[Tensor, Tensor]] = []
    _LOCAL.log = log
    try:
        yield lambda: put_back(log[::-1])
    finally:
        _LOCAL.log = before


def is_write(node: fx.Node) -> bool:
    return node.target is written_back


def written_inputs(nodes: Iterable[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The inputs that are written back, and those that are read again after it."""
    found: list[Any] = [n.args for n in nodes if is_write(n)]
    return {held for held, *_ in found}, {name for *_, again in found for name in again}


def is_of_held(node: fx.Node) -> bool:
    """A write to a tensor that the model holds, or a view of it itself: between regions."""
    return node.target in (written_back, view_of)


def selected_log_probs(logits: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``log_softmax(logits [..., V])`` in ``dtype``, at one ``index [..., 1]`` per row."""
    return logits.log_softmax(-1, dtype).gather(-1, index)


def picked_rows(x: Tensor, index: Tensor, wrap: bool) -> Tensor:
    """``x [rows, d]`` at ``index [n]``; ``wrap``: where it is negative, from the end.

    As a look-up: its gradient is added row by row.
    """
    index = torch.where(index < 0, index + x.shape[0], index) if wrap else index
    return torch.nn.functional.embedding(index, x)


def view_name(op: str, target: Any) -> str | None:
    """A name that stands for a view op in :func:`assigned`; None where there is none."""
    if op == "call_method":
        return f"Tensor.{target}" if hasattr(Tensor, str(target)) else None
    if target in (operator.getitem, getattr):
        return "getitem" if target is operator.getitem else "getattr"
    if target is DATA:
        return "Tensor.detach"
    name = getattr(target, "__name__", "")
    return f"torch.{name}" if name and getattr(torch, name, None) is target else None


def _function(name: str) -> Any:
    if name in ("getitem", "getattr"):
        return operator.getitem if name == "getitem" else getattr
    owner, _, attribute = name.partition(".")
    return getattr(Tensor if owner == "Tensor" else torch, attribute)
