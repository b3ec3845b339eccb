"""Checks of bodies and programs: each rule has a broken pass that it catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import small_program
from torch import fx

from fxmem.errors import VerificationError
from fxmem.passes.update_in_backward import UpdateInBackward
from fxmem.program import body_ops as runtime
from fxmem.program.steps import Free, Program
from fxmem.rewriting.fuel import fuelled
from fxmem.rewriting.pipeline import copy_body, run_passes


@dataclass(frozen=True)
class Rewrite:
    edit: Callable[[fx.Graph], object]
    name: str = "rewrite"

    def run(self, graph: fx.Graph, /) -> fx.Graph:
        graph = copy_body(graph)
        self.edit(graph)
        return graph


@dataclass(frozen=True)
class RewriteProgram:
    edit: Callable[[Program], Program]
    name: str = "rewrite"

    def run(self, program: Program, /) -> Program:
        return self.edit(program)


def program() -> Program:
    return small_program.program(runtime.add, runtime.contiguous)


def lost_write(graph: fx.Graph) -> None:
    graph.erase_node(next(n for n in graph.nodes if n.target is runtime.put))


def lost_argument(graph: fx.Graph) -> None:
    graph.erase_node(next(iter(graph.nodes)))


def late_value(graph: fx.Graph) -> None:
    nodes = list(graph.nodes)
    nodes[-2].append(next(n for n in nodes if n.target is runtime.take))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lost_write, "whether a body writes out"),
        (lost_argument, "the arguments of a body"),
        (late_value, "malformed graph"),
    ],
)
def test_broken_passes_over_bodies(edit: Callable[[fx.Graph], None], message: str) -> None:
    graph = program().loops[0].module.graph
    assert run_passes((Rewrite(lambda graph: None),), graph) is not graph
    with pytest.raises(VerificationError, match=message):
        run_passes((Rewrite(edit),), graph)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: replace(p, inputs=["x", "weight"]), "the inputs"),
        (lambda p: replace(p, outputs=["out", "acc"]), "the outputs"),
        (lambda p: replace(p, outputs=[None, "out"]), "the outputs"),
        (lambda p: replace(p, steps=[Free(["x"]), *p.steps]), "reads x, which is not there"),
        (lambda p: replace(p, steps=[*p.steps, Free(["acc"])]), "reads acc"),
        (lambda p: replace(p, steps=[replace(p.steps[0], ints=[])]), "other arguments"),
    ],
)
def test_broken_passes_over_programs(edit: Callable[[Program], Program], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        run_passes((RewriteProgram(edit),), program())


def test_a_program_that_is_edited_in_place() -> None:
    def edit(program: Program) -> Program:
        lost_write(program.loops[0].module.graph)
        return program

    with pytest.raises(VerificationError, match="changed its input"):
        run_passes((RewriteProgram(edit),), program())


def test_without_fuel_a_program_stays_as_it_is() -> None:
    given = program()
    with fuelled(0) as tank:
        assert run_passes((UpdateInBackward(0),), given) is given
    assert tank.asked == 1
