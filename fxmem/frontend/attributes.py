"""What the modules of a model hold beside tensors: counters, lists of what was seen, flags."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: parameters, buffers, hooks."""
_CONTAINERS = (list, dict, set, deque)


class Attributes:
    """Attributes of all modules inside ``model``, as they are now; of plain containers, what is in
    them as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (vars(m), {name: (value, _content(value)) for name, value in vars(m).items()
                       if name not in _OWN})
            for m in model.modules()
        ]  # fmt: skip

    def restore(self) -> None:
        for attributes, held in self._held:
            for name in attributes.keys() - _OWN - held.keys():
                del attributes[name]
            for name, (value, content) in held.items():
                attributes[name] = value
                if content is not None:
                    value.clear()
                    (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def _content(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None


__all__ = ["Attributes"]
