"""A body function is declared once, and everything that rewrites or runs bodies knows it."""

from __future__ import annotations

from typing import Any

import pytest
import small_program
import torch
from torch import Tensor, fx

from fxmem.backends.inductor import CompileLoops
from fxmem.backends.segments import Segment, segments
from fxmem.backends.symbolic_body import layout, propagate
from fxmem.passes.add_products import AddProducts
from fxmem.passes.in_place import InPlace
from fxmem.passes.keep_sum_dtype import KeepSumDtype
from fxmem.passes.lower_kernels import LowerKernels
from fxmem.passes.reuse_tangents import ReuseTangents
from fxmem.passes.update_in_backward import UpdateInBackward
from fxmem.program.body_op import BODY_OPS, BodyOp, nothing
from fxmem.program.steps import Loop, Program
from fxmem.rewriting.pipeline import Pass, run_passes
from fxmem.runtime.loops import CallState, execute
from fxmem.runtime.profile import run_fake

CPU = torch.device("cpu")
BODY: tuple[Pass[fx.Graph], ...] = (LowerKernels(CPU, []), InPlace(), AddProducts())


def add_half(acc: Tensor, value: Tensor) -> None:
    acc.add_(value, alpha=0.5)


def itself(x: Tensor) -> Tensor:
    return x


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    added = BodyOp(add_half, writes=(0,), fake=nothing, gradient="total")
    monkeypatch.setitem(BODY_OPS, add_half, added)
    monkeypatch.setitem(BODY_OPS, itself, BodyOp(itself, aliases=(0,)))
    return small_program.program(add_half, itself)


def run(program: Program, *more: Any) -> list[Tensor | None]:
    torch.manual_seed(0)
    tensors = torch.randn(3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    counter = type("", (), {"bodies": 0})
    return execute(program, CallState({"T": 7}), [*tensors, *more], 4, counter, {})


def targets(graph: fx.Graph) -> list[Any]:
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_passes_over_bodies(program: Program) -> None:
    (loop,) = program.loops
    want = run(program)
    graph = run_passes(BODY, loop.module.graph)
    found = targets(graph)
    assert found[-1] is add_half, "what it writes is an argument of the body"
    assert torch.ops.aten.mul_.Tensor in found, "in place behind the function that returns its own"
    loop.module = fx.GraphModule({}, graph)
    for a, b in zip(run(program), want, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_passes_over_programs(program: Program) -> None:
    want, _ = run(program)
    passes: tuple[Pass[Program], ...] = (
        UpdateInBackward(0), ReuseTangents(("x",)), KeepSumDtype("out"), CompileLoops(),
    )  # fmt: skip
    new = run_passes(passes, program)
    assert new.updates == [(0, False)] and new.outputs == [None, "out"]
    assert new.overwrites == {"out": "x"}

    class Sink:
        acc = torch.zeros(3, dtype=torch.float64)

        def total(self, add: Any, *args: Any) -> None:
            add(self.acc, *args)

    run(new, sink := Sink())
    assert want is not None and torch.equal(sink.acc, want)


def test_backends_and_memory(program: Program) -> None:
    (loop,) = program.loops
    parts = segments(loop.module.graph)
    before = [p for p in parts if isinstance(p, Segment)]
    assert [len(p.nodes) for p in before] == [2, 1, 1], "it ends at what reads it, and at a write"
    tensors = [torch.zeros(2, 3, dtype=torch.float64) for _ in loop.tensors]
    tensors[0] = tensors[3] = tensors[0][0]
    shapes = [small_program.SHAPES[n][0] for n in loop.tensors]
    values, _ = propagate(loop, shapes, tensors, [layout(t) for t in tensors])
    (added,) = (n for n in loop.module.graph.nodes if n.target is add_half)
    assert values[added] is None
    assert isinstance(values[added.args[1]], Tensor)
    assert run_fake(program, {"T": 8}, 4, [CPU], ()).peak > 8 * 3 * 8


def test_what_is_not_declared_is_taken_to_do_the_worst(program: Program) -> None:
    BODY_OPS.pop(itself)
    (loop,) = program.loops
    found = targets(run_passes(BODY, loop.module.graph))
    assert torch.ops.aten.mul_.Tensor not in found


def test_a_program_is_not_changed_by_its_passes(program: Program) -> None:
    before = str(program)
    UpdateInBackward(0).run(program)
    assert str(program) == before and isinstance(program.steps[0], Loop)
