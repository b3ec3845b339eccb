"""What the modules of a model hold beside parameters and buffers: counters, lists of what was seen,
flags, tensors that another module reads.
"""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: parameters, buffers, hooks."""
_CONTAINERS = (list, dict, set, deque)
_GONE = object()

Attribute = tuple[str, str]
"""The path of a module, and the name of what it holds."""


class Attributes:
    """Attributes of all modules inside ``model``, as they are now; of plain containers, what is in
    them as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (path, vars(m), {name: (value, _content(value)) for name, value in vars(m).items()
                             if name not in _OWN})
            for path, m in model.named_modules()
        ]  # fmt: skip

    def changed(self) -> set[Attribute]:
        """What is another object now, or holds other ones."""
        found: set[Attribute] = set()
        for path, attributes, held in self._held:
            new = attributes.keys() - _OWN - held.keys()
            other = {
                name for name, (value, content) in held.items()
                if attributes.get(name, _GONE) is not value or _differ(value, content)
            }  # fmt: skip
            found.update((path, name) for name in new | other)
        return found

    def restore(self) -> None:
        for _, attributes, held in self._held:
            for name in attributes.keys() - _OWN - held.keys():
                del attributes[name]
            for name, (value, content) in held.items():
                attributes[name] = value
                if content is not None and _differ(value, content):
                    value.clear()
                    (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def read(attribute: Attribute, sources: Iterable[str]) -> bool:
    """Whether one of Dynamo's names of what a capture depends on is this attribute."""
    path, name = attribute
    owner = "".join(rf"\._modules\['{re.escape(p)}'\]" for p in path.split(".") if p)
    named = re.compile(rf"L\['\w+'\]{owner}\.{re.escape(name)}\b")
    return any(map(named.match, sources))


def _differ(value: Any, content: Any) -> bool:
    """A container holds other objects than it did, or in another order."""
    if content is None:
        return False
    now, was = (list(c.items()) if isinstance(c, dict) else list(c) for c in (value, content))
    return len(now) != len(was) or any(map(operator.is_not, _flat(now), _flat(was)))


def _flat(entries: list[Any]) -> list[Any]:
    return [x for e in entries for x in (e if isinstance(e, tuple) else (e,))]


def _content(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None


__all__ = ["Attribute", "Attributes", "read"]
