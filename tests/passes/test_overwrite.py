"""A gradient that leaves a region takes the place of the one that came in, where that is safe."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import fx

import fxmem
from fxmem.axes.sizes import T
from fxmem.compiler.region_codes import _CODES
from fxmem.measure import live as measure
from fxmem.passes.reuse_tangents import ReuseTangents
from fxmem.program import body_ops as runtime
from fxmem.program.steps import Buffer, Loop, Program

PLAN = fxmem.Plan(stream=fxmem.Stream(chunk=32, loss_chunk=32, hold="none"))


def grads_and_peak(net: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    net.zero_grad()
    loss = net(**inputs).loss
    peak = measure.track(loss.backward).peak
    return {n: p.grad for n, p in net.named_parameters()}, peak


def test_one_tensor_serves_the_backward_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.model(num_hidden_layers=3)
    fxmem.transform(net, PLAN)
    inputs = tiny.batch(2, 1024)
    net(**inputs).loss.backward()
    programs = [p for c in _CODES for p in c.programs.values()]
    layer = next(p for p in programs if p.overwrites and "backward" in p.name)
    (buffer,) = layer.overwrites
    with_reuse, low = grads_and_peak(net, inputs)
    predicted = fxmem.explain(net).predicted_peak_bytes
    for program in programs:
        monkeypatch.setattr(program, "overwrites", {})
    without, high = grads_and_peak(net, inputs)
    for name, grad in without.items():
        assert torch.equal(with_reuse[name], grad), name
    hidden = 2 * 1024 * net.config.hidden_size * 4
    assert buffer in layer.outputs
    assert high - low >= 0.9 * hidden
    assert fxmem.explain(net).predicted_peak_bytes >= predicted


def loop(*, late_read: bool = False, other_rows: bool = False, twice: bool = False) -> Program:
    """``buffer[lo:hi] = 2 * given[lo:hi]``, and where asked what makes that unsafe in place."""
    graph = fx.Graph()
    lo, hi, buffer, given, total = (
        graph.placeholder(n) for n in ("lo", "hi", "buffer", "given", "total")
    )
    rows = graph.call_function(lambda a, b: b - a, (lo, hi))
    start = 0 if other_rows else lo
    chunk = graph.call_function(runtime.take, (given, 0, start, rows))
    view = graph.call_function(torch.ops.aten.view.default, (chunk, [-1]))
    value = graph.call_function(torch.ops.aten.mul.Tensor, (chunk, 2))
    graph.call_function(runtime.put, (buffer, value, 0, lo))
    if twice:
        graph.call_function(runtime.put, (buffer, value, 0, lo))
    if late_read:
        graph.call_function(runtime.add, (total, view))
    graph.output(None)
    step = Loop(
        fx.GraphModule({}, graph), [], ["buffer", "given", "total"], [], False,
        [Buffer("buffer", (T,), torch.float32, torch.float32, False)], [],
    )  # fmt: skip
    shape = ((T,), torch.float32)
    return Program("p", [], ["given", "total"], ["buffer"], [step], [], True, [],
                   {"given": shape, "total": shape, "buffer": shape})  # fmt: skip


def test_a_chunk_is_written_over_the_one_it_was_made_of() -> None:
    assert ReuseTangents(("given",)).run(loop()).overwrites == {"buffer": "given"}


@pytest.mark.parametrize("hazard", ["late_read", "other_rows", "twice"])
def test_not_where_the_tangent_is_still_read(hazard: str) -> None:
    assert ReuseTangents(("given",)).run(loop(**{hazard: True})).overwrites == {}
