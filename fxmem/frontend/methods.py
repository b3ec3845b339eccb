"""Which method of which module a place in the captured code belongs to."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from traceback import FrameSummary
from types import CodeType
from typing import Any

from torch import fx, nn

from fxmem.frontend.origin import Line, module_path, stack_of

Method = tuple[nn.Module, str]


def method_of(module: nn.Module, code: CodeType) -> str | None:
    """The method of ``module`` that runs ``code``, decorated or not; None for code of a decorator
    that several methods have."""
    names = {name for name, found in _codes(module) if found is code}
    return names.pop() if len(names) == 1 else None


def methods_at(node: fx.Node, model: nn.Module) -> list[Method]:
    """Methods of submodules that led to a node, innermost first; of modules with the same code any
    one."""
    methods = methods_on(stack_of(node), model)
    # lines of torch's own modules are not among those of a node
    last = _submodule(model, module_path(node))
    if last is not None and (not methods or last in set(methods[0][0].modules()) - {methods[0][0]}):
        methods.insert(0, (last, "forward"))
    return methods


def methods_on(lines: Sequence[Line], model: nn.Module) -> list[Method]:
    """Methods of submodules among calls, innermost first; of modules with the same code any one."""
    inside = [m for m in model.modules() if m is not model]
    found = [
        next(((m, name) for m in inside if (name := _method_at(m, line))), None)
        for line in reversed(lines)
    ]
    return [m for m in found if m is not None]


@contextlib.contextmanager
def called_at(place: FrameSummary) -> Iterator[list[nn.Module]]:
    """The modules that are called in plain PyTorch, by this line itself, inside the context."""
    found: list[nn.Module] = []
    last = getattr(place, "end_lineno", None) or place.lineno or 0

    def called(module: nn.Module, _: Any) -> None:
        frame = inspect.currentframe()
        while frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) != (
            place.filename, place.name
        ):  # fmt: skip
            frame = frame.f_back
        at = frame is not None and (place.lineno or 0) <= frame.f_lineno <= last
        if at and not any(module in set(one.modules()) for one in found):  # nor by another
            found.append(module)

    handle = nn.modules.module.register_module_forward_pre_hook(called)
    try:
        yield found
    finally:
        handle.remove()


def _submodule(model: nn.Module, path: str | None) -> nn.Module | None:
    """The module of a path, which may begin with a name for ``model`` itself."""
    known = dict(model.named_modules())
    while path and path not in known:
        path = path.partition(".")[2]
    return known[path] if path else None


def _method_at(module: nn.Module, line: Line) -> str | None:
    for name, code in _codes(module):
        if code.co_filename == line.file and code.co_name == line.function:
            last = max(at or 0 for *_, at in code.co_lines())
            if code.co_firstlineno <= line.number <= last:
                return name
    return None


def _codes(module: nn.Module) -> Iterator[tuple[str, CodeType]]:
    """The code of every method, and of what decorators have wrapped around it."""
    owners = [vars(module), *(vars(c) for c in type(module).__mro__ if c is not nn.Module)]
    for name, value in ((n, v) for names in owners for n, v in names.items()):
        function: Any = value
        while function is not None:
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                yield name, code
            function = getattr(function, "__wrapped__", None)


__all__ = ["Method", "called_at", "method_of", "methods_at", "methods_on"]
