"""Compiled segments of chunk bodies, each with the check that what it was compiled for holds.

The first segment of a form is compiled for its own constants. A second one with other constants (a
model pruned to another width, say) makes those that differ symbols, so any number of widths costs
two compilations; Dynamo treats sizes that change in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from fxmem._compat import inductor as _compat_inductor
from fxmem._compat.inductor import Symbolic
from fxmem.axes.sizes import Size, number
from fxmem.backends.segment_form import Form, Lifted, canonical, evaluate
from fxmem.backends.stats import STATS
from fxmem.caches import Cache

Compiled = Callable[[list[Any]], Sequence[Tensor]]


class SegmentCall(torch.nn.Module):
    """A compiled segment: takes the list of its sizes and tensors, and empties it."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._form, self._code = form, code_for(form)
        self._widths = self._code.widths(form.constants)
        self._known: dict[tuple[int, ...], list[tuple[int, ...]] | None] = {}

    @property
    def names(self) -> list[str]:
        """Sizes of the body that it takes."""
        return self._form.names

    @property
    def tensors(self) -> list[Any]:
        """Values of the body that it takes, after the sizes."""
        return self._form.tensors

    def forward(self, held: list[Any]) -> Sequence[Tensor]:
        count = len(self._form.names)
        ints = tuple(held[:count])
        wanted = self._wanted(ints)
        if wanted is not None and all(map(_lies_as, held[count:], wanted)):
            held[count:count] = self._widths
            return self._code.compiled(held)
        STATS.eager_calls += 1
        plain: tuple[Tensor, ...] = self._form.run(ints, self._form.constants, held[count:])
        return plain

    def _wanted(self, ints: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """Strides that were compiled for; None where sizes were assumed that these are not."""
        if ints not in self._known:
            form, values = self._form, _named("n", ints)
            holds = self._code.holds(ints, self._widths)
            self._known[ints] = [
                tuple(evaluate(s, form.constants, values) for s in m.stride) for m in form.metas
            ] if holds else None  # fmt: skip
        return self._known[ints]


@dataclass(slots=True)
class Code:
    """Compiled code; ``groups`` has per constant the number of its symbol, -1 where it is fixed."""

    form: Form
    groups: tuple[int, ...]
    compiled: Compiled
    guards: list[Size] = field(default_factory=list)

    def widths(self, constants: Sequence[int]) -> list[int]:
        """Values of the symbols."""
        found = {g: c for g, c in zip(self.groups, constants, strict=True) if g >= 0}
        return [found[g] for g in sorted(found)]

    def holds(self, ints: Sequence[int], widths: Sequence[int]) -> bool:
        """Nothing else was assumed about these sizes."""
        values = {**_named("n", ints), **_named("w", widths)}
        return all(number(g, values) for g in self.guards)

    def serves(self, form: Form) -> bool:
        """It computes what a segment of this form is."""
        seen: dict[int, int] = {}
        for group, own, other in zip(self.groups, self.form.constants, form.constants, strict=True):
            if other != (own if group < 0 else seen.setdefault(group, other)):
                return False
        return self.holds(form.hints, self.widths(form.constants))


_CODES: Cache[tuple[Any, ...], list[Code]] = Cache("compiled segments")


def code_for(form: Form) -> Code:
    """Code that serves the form, compiled where there is none yet."""
    codes = _CODES.setdefault(form.key, [])
    for code in codes:
        if code.serves(form):
            STATS.shared += 1
            return code
    if codes:
        try:
            new = _compiled(form, _groups([c.form.constants for c in codes], form.constants))
        except Exception as error:  # what its widths cannot be symbols of, is compiled as it is
            STATS.failed[f"widths {form.constants}"] = str(error).split("\n")[0]
        else:
            if new.serves(form):
                codes.insert(0, new)
                return new
    codes.append(_compiled(form, (-1,) * len(form.constants)))
    return codes[-1]


def _groups(seen: Sequence[Sequence[int]], new: Sequence[int]) -> tuple[int, ...]:
    """Constants that differ somewhere, by what they were everywhere: equal ones are one symbol."""
    columns = list(zip(*seen, new, strict=True))
    numbers: dict[tuple[int, ...], int] = {}
    return tuple(-1 if len(set(c)) == 1 else numbers.setdefault(c, len(numbers)) for c in columns)


def _compiled(form: Form, groups: tuple[int, ...]) -> Code:
    code = Code(form, groups, lambda held: ())
    count = len(form.names)
    hints = {**_named("n", form.hints), **_named("w", code.widths(form.constants))}
    own = Symbolic.of(hints)
    constants = [
        sympy.Integer(c) if g < 0 else sympy.Symbol(canonical(g, "w"), integer=True)
        for g, c in zip(groups, form.constants, strict=True)
    ]

    def sizes(given: Sequence[Lifted]) -> list[Size]:
        return [rest if at < 0 else constants[at] * rest for at, rest in given]

    def run(*args: Any) -> Any:
        ints, widths = args[:count], args[count : len(hints)]
        chosen = [c if g < 0 else widths[g] for g, c in zip(groups, form.constants, strict=True)]
        return form.run(ints, chosen, args[len(hints) :])

    tensors = [own.tensor(sizes(m.shape), sizes(m.stride), m.dtype, m.device) for m in form.metas]
    free = [len(hints) + i for i in form.free]
    given = [*own.ints.values(), *tensors]
    code.compiled = _compat_inductor.compile_segment(run, own, given, free)
    code.guards = own.guards()
    STATS.compiled += 1
    return code


def _named(letter: str, numbers: Sequence[int]) -> dict[str, int]:
    """The numbers by the names that :func:`~fxmem.backends.segment_form.canonical` gives them."""
    return {canonical(i, letter): n for i, n in enumerate(numbers)}


def _lies_as(x: Tensor, strides: tuple[int, ...]) -> bool:
    """``x`` has elements, and these strides wherever it has more than one row."""
    return x.numel() > 0 and (
        x.stride() == strides
        or all(a == b or n == 1 for a, b, n in zip(x.stride(), strides, x.shape, strict=True))
    )
