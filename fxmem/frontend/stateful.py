"""Functions of a model that take a state and give one, found where a capture fails in their loop.

A recurrence in plain PyTorch is a loop over the length, which no capture with a symbolic length can
follow. Often the function around it is made for decoding too: it takes a state, which is None in
training, and gives the next one. Such a function is one operator that hands its state from chunk to
chunk (:mod:`fxmem.kernels.recurrence`). Nothing is known of it by name. Its calls are recorded in a
run of the model as it is, and each is tried: the chunks of the call, one after the other, must give
what the whole gave, and each sequence what it gives alone. Sizes that the call's length and batch
have are its axes; what fails the trial stays a piece.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.frontend.methods import method_of
from fxmem.frontend.stateful_form import Form, form_of, states_of
from fxmem.kernels.recurrence import recurrence
from fxmem.rules.carried import CALLS

FORMS: dict[str, Form] = {}
"""By name."""


@torch.compiler.allow_in_graph
def call_stateful(name: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """One node of the captured graph."""
    CALLS.setdefault(name, FORMS[name].called())
    y, last, _ = recurrence(list(tensors), name)
    return y, last[0]


@dataclass(eq=False, slots=True)
class Stateful:
    """Function ``name`` of a namespace, or method of a module: what a capture sees in its place.

    ``own``: itself; ``forms``: how it may be called.
    """

    holder: Any
    name: str
    own: Callable[..., Any]
    forms: list[Form] = field(default_factory=list)
    stub: Callable[..., Any] = field(init=False)
    recorded: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    settings: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        own, forms, names = self.own, self.forms, tuple(inspect.signature(self.own).parameters)

        def streamed(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            for form in forms:
                if form.fits(given):
                    y, last = call_stateful(form.name, *[given[n] for n, *_ in form.types])
                    return y, form.result(last)
            return own(*args, **kwargs)

        self.stub = streamed

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it, and remembers the call."""
        result = self.own(*args, **kwargs)
        given = inspect.signature(self.own).bind(*args, **kwargs).arguments
        self.recorded.append((dict(given), result))
        return result

    @contextlib.contextmanager
    def replaced(self, by: Callable[..., Any]) -> Iterator[None]:
        """``by`` is called instead."""
        space = vars(self.holder)
        before = space.get(self.name)
        setattr(self.holder, self.name, by)
        try:
            yield
        finally:
            if before is None:
                delattr(self.holder, self.name)
            else:
                setattr(self.holder, self.name, before)

    def outdated(self) -> bool:
        """Whether its module has other settings than when its forms were found, which go."""
        other = bool(self.forms) and self.settings != _settings(self.holder)
        if other:
            self.forms.clear()
        return other

    def learn(self, length: int) -> bool:
        """Whether a form was found that was not known."""
        known, function = list(FORMS.values()), _as_it_is(self.own)
        found = [form_of(function, *call, length, known) for call in self.recorded]
        self.recorded.clear()
        self.settings = _settings(self.holder)
        new = [f for f in dict.fromkeys(found) if f is not None and f not in self.forms]
        self.forms += new
        FORMS.update((f.name, f) for f in new)
        return bool(new)


def places(
    frames: Sequence[tuple[Any, CodeType]], model: nn.Module
) -> Iterator[tuple[CodeType, list[Stateful]]]:
    """Functions and methods with a state in which a capture was, innermost first."""
    names = {c.__module__ for m in model.modules() for c in type(m).__mro__ if c is not nn.Module}
    spaces = [sys.modules[n] for n in sorted(names) if n in sys.modules]
    for owner, code in frames:
        found: list[Stateful] = []
        name = method_of(owner, code) if isinstance(owner, nn.Module) else None
        if name is not None:
            like = [m for m in model.modules() if type(m) is type(owner) and m is not model]
            found = [Stateful(m, name, f) for m in like if (f := _alone(m, name, code))]
        else:
            found = [
                Stateful(space, n, f) for space in spaces for n, f in vars(space).items()
                if isinstance(f, FunctionType) and f.__code__ is code
            ]  # fmt: skip
        if found := [s for s in found if states_of(s.own, {})]:
            yield code, found


def _alone(module: nn.Module, name: str, code: CodeType) -> Callable[..., Any] | None:
    """A method, without its module where it does not read that; None where it reads its tensors,
    or whether it trains.
    """
    method = getattr(type(module), name, None)
    if not isinstance(method, FunctionType) or name in vars(module):
        return None
    if not any(i.argval == code.co_varnames[0] for i in dis.get_instructions(code)):
        return functools.partial(method, None)
    reads = [*module.parameters(), *module.buffers()] or "training" in code.co_names
    return None if reads else getattr(module, name)


def _settings(holder: Any) -> list[tuple[str, Any]]:
    """What a method may read of its module, of which a capture sees nothing."""
    kinds = (int, float, str, torch.dtype, type(None))
    own = vars(holder).items() if isinstance(holder, nn.Module) else ()
    return [(n, v) for n, v in own if isinstance(v, kinds) and n != "training"]


def _as_it_is(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a copy of its module, which does not change with it."""
    module = getattr(method, "__self__", None)
    return method if module is None else getattr(copy.copy(module), method.__name__)


__all__ = ["Stateful", "call_stateful", "places"]
