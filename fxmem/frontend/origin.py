"""Where an operator or a failure comes from: module path and source line.

The line is the user's own where one is involved. A line of an installed library is named by its
path inside the library, so that a reader sees that it is not theirs to change.
"""

from __future__ import annotations

import functools
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx

from fxmem.caches import Cache

_INSTALLED = ("site-packages", "dist-packages")
_STANDARD = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_PACKAGE = Path(__file__).parent.parent
_OWN = tuple(str(p) + "/" for p in (
    _PACKAGE, _PACKAGE.parent / "passes", _PACKAGE.parent / "kernels"
))  # fmt: skip
_BELOW = (
    *_OWN,
    str(Path(torch.__file__).parent) + "/",
    *(s + "/contextlib" for s in _STANDARD),
    "<",
)
_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)\n?\s*(.*)')


def name_of(target: Any) -> str:
    """The name of the function or method that a node of a captured graph calls."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def is_own(file: str) -> bool:
    """The file is one of fxmem's."""
    return file.startswith(_OWN)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a call stack, outermost first in a stack."""

    file: str
    number: int
    function: str
    code: str = ""

    @property
    def library(self) -> str | None:
        """The installed library it belongs to; None for code of the user's own."""
        if is_own(self.file):
            return "fxmem"
        parts = Path(self.file).parts
        for name in _INSTALLED:
            if name in parts[:-1]:
                return parts[parts.index(name) + 1]
        return "python" if self.file.startswith((*_STANDARD, "<frozen")) else None

    def __str__(self) -> str:
        file = self.file
        if (library := self.library) not in (None, "fxmem", "python"):
            parts = Path(file).parts
            file = "/".join(parts[parts.index(str(library)) :])
        return f'File "{file}", line {self.number}, in {self.function}  {self.code}'.rstrip()


def place(stack: Sequence[Line]) -> Line | None:
    """The innermost line of the user's own; else the innermost of a library other than torch."""
    own = [line for line in stack if line.library is None]
    others = [line for line in stack if line.library not in ("torch", "fxmem", "python")]
    return next((lines[-1] for lines in (own, others, stack) if lines), None)


_WRITTEN: Cache[str, dict[int, Line]] = Cache("lines of recorded calls", 512)
"""For source text that fxmem wrote: the line of the program that each of its lines stands for."""


def stands_for(file: str, lines: dict[int, Line]) -> None:
    """Lines of the text that is compiled as ``file`` are named by these of the user's."""
    _WRITTEN[file] = lines


def stack_of(node: fx.Node) -> list[Line]:
    """The calls that made a node, outermost first."""
    found = _FRAME.findall(str(node.meta.get("stack_trace") or ""))
    lines = [Line(file, int(number), name, code.strip()) for file, number, name, code in found]
    return [_WRITTEN.get(line.file, {}).get(line.number, line) for line in lines]


def calling_line() -> Line:
    """The innermost line under way that belongs neither to fxmem nor to torch; without its code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BELOW):
        frame = frame.f_back
    if frame is None:
        return Line("an unknown file", 0, "")
    return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def source_line(node: fx.Node) -> str | None:
    """``File "net.py", line 3, in forward  code`` of the call that made a node."""
    line = place(stack_of(node))
    return None if line is None else str(line)


def module_path(node: fx.Node) -> str | None:
    """Dotted path of the module that a node comes from, such as ``model.layers.3.mlp``."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return path_of(list(stack.values())[-1][0]) if stack else None


def module_calls(node: fx.Node) -> list[tuple[str, int]]:
    """The calls of modules that a node comes from, the outermost first: path, and number."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    found = [(path_of(source), str(key).partition("@")[2]) for key, (source, _) in stack.items()]
    return [(path, int(number or 0)) for path, number in found if path]


def path_of(source: Any) -> str | None:
    """What the user calls a module, from Dynamo's name for it, such as ``L['self'].blocks[1]``."""
    return _path(str(source))


@functools.lru_cache(maxsize=1 << 14)
def _path(text: str) -> str | None:
    text = re.sub(r"^[LG]\['(self|args|kwargs|fn)'\](\[[^\]]*\]|\.__self__)*", "", text)
    text = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", text.replace("_modules", ""))
    text = re.sub(r"^[LG]\.", "", text.replace("__self__", ""))
    return ".".join(filter(None, text.split("."))) or None


__all__ = [
    "Line", "calling_line", "is_own", "module_calls", "module_path", "name_of", "path_of", "place",
    "source_line", "stack_of", "stands_for",
]  # fmt: skip
