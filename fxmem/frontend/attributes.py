"""What the modules of a model hold beside parameters and the values of buffers: counters, lists of
what was seen, objects with a state, tensors that another module reads, and which buffers.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat.capture_stack import dynamic_sources

_BUFFERS = "_buffers"
_OWN = frozenset(vars(nn.Module())) - {_BUFFERS}
"""Attributes of every module: parameters, hooks."""
_CONTAINERS = (list, dict, set, deque)
_NO_STATE = (
    nn.Module, Tensor, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType,
)  # fmt: skip
_DEPTH = 3
"""Containers inside containers that are looked into."""
_GONE = object()

Attribute = tuple[str, str]
"""The path of a module, and the name of what it holds, or of an attribute or entry of that."""


def held_values(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Buffers, and other tensors that the modules of ``model`` hold and a call may write, each with
    a copy.
    """
    found = {id(b): b for b in model.buffers()}
    for module in model.modules():
        found |= {id(t): t for t in vars(module).values() if type(t) is Tensor and _may_write(t)}
    return [(t, t.clone()) for t in found.values()]


def _may_write(t: Tensor) -> bool:
    """PyTorch refuses writes to tensors of inference, and to those whose elements share memory."""
    return not (t.requires_grad or t.is_inference() or 0 in t.stride())


def put_back(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Each tensor as it was when its value was copied."""
    with torch.no_grad():
        for held, value in values:
            held.copy_(value)


class Attributes:
    """Attributes of all modules inside ``model``, as they are now, and what is inside them."""

    def __init__(self, model: nn.Module) -> None:
        self._inside: dict[int, tuple[Any, Any]] = {}  # containers, each with a copy
        self._held = [
            (path, vars(m), {name: (value, self._ids(name, value))
                             for name, value in vars(m).items() if name not in _OWN})
            for path, m in model.named_modules()
        ]  # fmt: skip

    def _ids(self, name: str, value: Any) -> list[tuple[str, bool, int]]:
        found = list(_containers(name, value))
        for *_, one in found:
            self._inside.setdefault(id(one), (one, one.copy()))
        return [(label, attributes, id(one)) for label, attributes, one in found]

    def changed(self) -> set[Attribute]:
        """What is another object now, or holds other ones."""
        other = {key: both for key, both in self._inside.items() if _differ(*both)}
        found: set[Attribute] = set()
        for path, attributes, held in self._held:
            names = attributes.keys() - _OWN - held.keys()
            names |= {n for n, (value, _) in held.items() if attributes.get(n, _GONE) is not value}
            for label, of_object, key in (one for _, inside in held.values() for one in inside):
                if key in other and of_object:
                    names |= {f"{label}.{name}" for name in _other_keys(*other[key])}
                elif key in other:
                    names.add(label)
            found.update((path, name) for name in names)
        return found

    def restore(self) -> None:
        """As it was, but for attributes that are new: what is made once, at the first call, such as
        hooks and the flag that they are there, is not made again.
        """
        objects = {key for *_, held in self._held for _, inside in held.values()
                   for _, of_object, key in inside if of_object}  # fmt: skip
        for _, attributes, held in self._held:
            attributes.update((name, value) for name, (value, _) in held.items())
        for key, (now, was) in self._inside.items():
            if _differ(now, was):
                if key not in objects:
                    now.clear()
                (now.extend if isinstance(now, (list, deque)) else now.update)(was)


class Counters:
    """Whole numbers that the modules of ``model`` hold and that change between calls. A capture
    takes them as it takes a size: no value has one of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[Attribute, int] = {}
        self._varying: dict[Attribute, None] = {}

    @contextlib.contextmanager
    def shown(
        self, watch: Callable[[Callable[[], None]], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """``watch(begin)`` is a context in which ``begin`` is called when a capture begins."""
        with contextlib.ExitStack() as stack:

            def begin() -> None:
                self._look()
                if self._varying:
                    stack.enter_context(dynamic_sources([rf"{_named(a)}\Z" for a in self._varying]))

            stack.enter_context(watch(begin))
            yield

    def _look(self) -> None:
        for path, module in self._model.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and self._seen.setdefault((path, name), value) != value:
                    self._varying[path, name] = None


def read(attribute: Attribute, sources: Iterable[str]) -> bool:
    """Whether one of Dynamo's names of what a capture depends on is this attribute."""
    named = re.compile(_named(attribute))
    return any(map(named.match, sources))


def _named(attribute: Attribute) -> str:
    """A pattern of Dynamo's names of it."""
    path, name = attribute
    owner = "".join(rf"\._modules\['{re.escape(p)}'\]" for p in path.split(".") if p)
    held = "".join(rf"(?:\.{n}\b|\['{n}'\])" for n in map(re.escape, name.split(".")))
    return rf"L\['\w+'\]{owner}{held}"


def _containers(name: str, value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, bool, Any]]:
    """Plain containers, and the attributes of plain objects, from the outside in: a name, whether
    it is an object's, and the container or the dictionary of attributes.
    """
    of_object = type(value) not in _CONTAINERS
    if of_object and (isinstance(value, _NO_STATE) or not hasattr(value, "__dict__")):
        return
    holder = vars(value) if of_object else value
    yield name, of_object or name == _BUFFERS, holder
    entries = holder.items() if isinstance(holder, dict) else ((None, v) for v in holder)
    for key, inner in list(entries):
        if depth:
            yield from _containers(f"{name}.{key}" if of_object else name, inner, depth - 1)


def _other_keys(now: dict[str, Any], was: dict[str, Any]) -> set[str]:
    return {k for k in now.keys() | was.keys() if now.get(k, _GONE) is not was.get(k, _GONE)}


def _differ(now: Any, was: Any) -> bool:
    """It holds other objects, or in another order."""
    a, b = (list(c.items()) if isinstance(c, dict) else list(c) for c in (now, was))
    return len(a) != len(b) or any(map(operator.is_not, _flat(a), _flat(b)))


def _flat(entries: list[Any]) -> list[Any]:
    return [x for e in entries for x in (e if isinstance(e, tuple) else (e,))]


__all__ = ["Attribute", "Attributes", "Counters", "read"]
