"""Private names of accelerate and of ``enum``: ``dynamo_backend="fxmem"``.

accelerate keeps the backends that it knows in an enum, which has no way to add one. The Trainer's
``torch_compile_backend`` ends there as well. The member is added when accelerate is imported, or
now where it has been.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

__all__ = ["known", "register"]

MODULE, NAME = "accelerate.utils.dataclasses", "FXMEM"


def known(kind: Any) -> bool:
    """The enum is made as that of accelerate 1.15 is: of strings in capitals."""
    members = getattr(kind, "__members__", {})
    return issubclass(kind, str) and getattr(members.get("INDUCTOR"), "value", "") == "INDUCTOR"


def register() -> None:
    """Let accelerate take ``"fxmem"`` for a backend, whichever is imported first."""
    if MODULE in sys.modules:
        _add(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add(module: Any) -> None:
    kind = getattr(module, "DynamoBackend", None)
    if kind is None or not known(kind) or NAME in kind.__members__:
        return
    member = str.__new__(kind, NAME)
    member._name_ = member._value_ = NAME
    kind._member_names_.append(NAME)
    kind._member_map_[NAME] = kind._value2member_map_[NAME] = member


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; what is found for the one module is told when it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.inner.exec_module(module)
        _add(module)
