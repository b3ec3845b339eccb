"""The program of a region: loops over chunk bodies, straight-line code, buffers.

A program is data. ``steps`` run in order over an environment of named tensors; every body is an
``fx.GraphModule`` that takes plain ints (sizes, ``lo``, ``hi``) and tensors and writes its results
in place, so one body serves every length, batch size and chunk.
:func:`fxmem.runtime.loops.execute` runs it, ``str()`` prints it as readable Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import fx

from fxmem.axes.signature import Cut
from fxmem.axes.sizes import Size


@dataclass(slots=True)
class Buffer:
    """A tensor the program allocates: ``zero`` for accumulators, else written chunk by chunk.

    ``dtype`` is the stored type, ``result`` the type its readers see; ``start``: a tensor that it
    begins as; ``local``: it has the rows of this rank alone.
    """

    name: str
    shape: tuple[Size, ...]
    dtype: torch.dtype
    result: torch.dtype
    zero: bool
    start: str = ""
    local: bool = False


@dataclass(slots=True)
class Mask:
    """Rows of an attention mask: ``module(*ints, lo, hi, *tensors) -> [B|1, H|1, hi - lo, S]``.

    ``ordered``: of some call whose keys are the tokens, so that it can be causal.
    """

    name: str
    module: fx.GraphModule
    ints: list[str]
    tensors: list[str]
    key: str
    ordered: bool = True


@dataclass(slots=True)
class Straight:
    """``module(*ints, *tensors) -> results``, computed once."""

    module: fx.GraphModule
    ints: list[str]
    tensors: list[str]
    results: list[str]


class Compiled(Protocol):
    """A body in another form; ``forms`` has those that were made so far."""

    forms: dict[Any, Any]

    def bind(self, tensors: Sequence[Any], /) -> Callable[..., Any]:
        """What takes the module's place for a loop over these tensors."""


@dataclass(slots=True)
class Loop:
    """``for [lo, hi) in chunks: module(*ints, lo, hi, *masks, *tensors)``; tensors include what it
    writes.

    ``compiled``: what runs the body instead of ``module``, by :meth:`Compiled.bind`; ``bounds``:
    what it is told of its chunk, with ``at`` where ranks have parts of the sequence.
    """

    module: fx.GraphModule
    ints: list[str]
    tensors: list[str]
    masks: list[str]
    descending: bool
    allocate: list[Buffer]
    finish: list[Buffer]
    compiled: Compiled | None = None
    bounds: tuple[str, ...] = ("lo", "hi")


@dataclass(slots=True)
class Free:
    """Names that nothing later reads."""

    names: list[str]


@dataclass(slots=True)
class Exchange:
    """What ranks that stream parts of one sequence do together; ``results`` are of ``tensors``.

    ``gather``: whole tensors of the ranks' rows. ``scatter``: the rows of this rank of a sum over
    ranks. ``sum``: that sum whole, in place. ``rows``: the rows of this rank of what all ranks have
    whole, which sends nothing. ``cuts``: where each has the sequence; ``shapes``: whole.
    """

    kind: Literal["gather", "scatter", "sum", "rows"]
    tensors: list[str]
    results: list[str]
    cuts: list[Cut | None]
    shapes: list[tuple[Size, ...]]


Step = Straight | Loop | Free | Exchange


@dataclass(slots=True)
class Program:
    """What a region runs: ``inputs`` by name in call order, ``steps``, ``outputs`` by name."""

    name: str
    ints: list[str]
    inputs: list[str]
    outputs: list[str | None]
    steps: list[Step]
    masks: list[Mask]
    causal: bool
    barriers: list[Barrier] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[Size, ...], torch.dtype]] = field(default_factory=dict)
    overwrites: dict[str, str] = field(default_factory=dict)
    """Buffer -> the tangent whose place it may take; see :mod:`fxmem.passes.reuse_tangents`."""
    updates: list[tuple[int, bool]] = field(default_factory=list)
    """Per further input, which takes a gradient instead of an accumulator: the position of the
    input whose gradient it is, and whether a product for it is its transpose; see
    :mod:`fxmem.passes.update_in_backward`."""

    @property
    def loops(self) -> list[Loop]:
        return [s for s in self.steps if isinstance(s, Loop)]

    def __str__(self) -> str:
        return "\n".join(_print(self))


def _print(program: Program) -> list[str]:
    lines = [f"def {program.name}({', '.join([*program.ints, *program.inputs])}):"]
    bodies: list[str] = []
    for i, step in enumerate(program.steps):
        if isinstance(step, Straight):
            given = ", ".join([*step.ints, *step.tensors])
            lines.append(f"    {', '.join(step.results)} = straight_{i}({given})")
            bodies += _body(f"straight_{i}", step.module)
        elif isinstance(step, Free):
            lines.append(f"    del {', '.join(step.names)}")
        elif isinstance(step, Exchange):
            lines.append(f"    {', '.join(step.results)} = {step.kind}({', '.join(step.tensors)})")
        else:
            for b in step.allocate:
                make = "zeros" if b.zero else "empty"
                made = f"{b.start}.clone()" if b.start else f"{make}{_shape(b.shape)}"
                lines.append(f"    {b.name} = {made}  # {str(b.dtype).removeprefix('torch.')}")
            order = "reversed(chunks)" if step.descending else "chunks"
            lines.append(f"    for {', '.join(step.bounds)} in {order}:")
            given = ", ".join([*step.ints, *step.bounds, *step.masks, *step.tensors])
            lines.append(f"        body_{i}({given})")
            bodies += _body(f"body_{i}", step.module)
    lines.append(f"    return {', '.join(str(o) for o in program.outputs)}")
    return [*lines, *bodies]


def _shape(shape: Sequence[Size]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _body(name: str, module: fx.GraphModule) -> list[str]:
    code = module.code.strip().replace("def forward(self, ", f"def {name}(")
    return ["", *(line for line in code.splitlines() if line.strip())]


Value = Any


@dataclass(frozen=True, slots=True)
class Barrier:
    """An op that had to run whole although a cut value reaches it.

    ``small``: it moves rows, no more than the region is given or gives whole anyway.
    """

    node: fx.Node
    op: str
    reason: str
    module: str | None
    source: str | None
    shape: tuple[Size, ...]
    small: bool = False
