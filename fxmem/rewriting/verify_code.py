"""Checks of generated code: the bodies of loops, and programs of bodies.

Their nodes have no recorded values; what is checked is who gives and takes what.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxmem.errors import VerificationError
from fxmem.program.steps import Exchange, Free, Loop, Mask, Program, Straight
from fxmem.rewriting.aliases import written_arguments
from fxmem.rewriting.text import Subject


def graphs(subject: Subject) -> list[fx.Graph]:
    """Every graph of it."""
    if isinstance(subject, fx.Graph):
        return [subject]
    if not isinstance(subject, Program):
        return [subject.graph]
    parts = (*subject.masks, *subject.steps)
    return [p.module.graph for p in parts if not isinstance(p, (Free, Exchange))]


def check_code(name: str, before: Subject, after: fx.Graph | Program) -> None:
    """Raise :class:`VerificationError` where pass ``name`` broke the signature or a name."""
    if isinstance(after, Program):
        assert isinstance(before, Program)
        _check_inputs(name, before, after)
        _check_names(name, after)
        return
    assert isinstance(before, fx.Graph)
    if _takes(before) != _takes(after):
        raise VerificationError(f"pass {name} changed the arguments of a body")
    if (old := written_arguments(before)) != (new := written_arguments(after)):
        wrong = ", ".join(sorted(old ^ new))
        raise VerificationError(f"pass {name} changed whether a body writes {wrong}")


def _takes(graph: fx.Graph) -> list[object]:
    return [n.target for n in graph.find_nodes(op="placeholder")]


def _check_inputs(name: str, before: Program, after: Program) -> None:
    """Inputs and outputs are the same, but for gradients that an update takes where they are
    made.
    """
    known = len(before.inputs)
    taken = [p for p, _ in after.updates[len(before.updates) :]]
    outputs = [None if i in taken else o for i, o in enumerate(before.outputs)]
    if after.ints != before.ints or after.inputs[:known] != before.inputs:
        raise VerificationError(f"pass {name} changed the inputs of a program")
    if after.outputs != outputs or len(after.inputs) - known != len(taken):
        raise VerificationError(f"pass {name} changed the outputs of a program")


def _check_names(name: str, program: Program) -> None:
    """Every name that a step reads is there, and every module takes and gives what it should."""
    there = set(program.inputs)
    for step in program.steps:
        if isinstance(step, Loop):
            there.update(b.name for b in step.allocate)
        _check_there(name, step.names if isinstance(step, Free) else step.tensors, there)
        if isinstance(step, Free):
            there.difference_update(step.names)
        if isinstance(step, (Straight, Exchange)):
            there.update(step.results)
    _check_there(name, [o for o in program.outputs if o is not None], there)
    for part in (*program.masks, *program.steps):
        if not isinstance(part, (Free, Exchange)):
            _check_module(name, part)


def _check_there(name: str, read: Sequence[str], there: set[str]) -> None:
    if missing := set(read) - there:
        what = ", ".join(sorted(missing))
        raise VerificationError(f"pass {name}: a program reads {what}, which is not there")


def _check_module(name: str, part: Mask | Straight | Loop) -> None:
    graph = part.module.graph
    count = len(part.ints) + len(part.tensors)
    if isinstance(part, Mask):
        count += 2  # the bounds of the chunk
    if isinstance(part, Loop):
        count += len(part.bounds) + len(part.masks)
    if len(_takes(graph)) != count:
        raise VerificationError(f"pass {name}: a body takes other arguments than it is given")
    (output,) = graph.find_nodes(op="output")
    if isinstance(part, Straight) and len(output.args[0]) != len(part.results):
        raise VerificationError(f"pass {name}: a step gives other results than {part.results}")
