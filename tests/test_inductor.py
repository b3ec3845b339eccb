"""``lower="inductor"``: the same numbers, compiled once, with no more memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from torch import Tensor, fx

import fxmem
from fxmem import Plan, Stream, _compat_inductor, inductor, measure, runtime
from fxmem.passes.segments import Segment, segments

aten = torch.ops.aten


def transformed(lower: str, chunk: int = 8, **changes: int) -> torch.nn.Module:
    net = tiny.model("llama", **changes)
    stream = Stream(chunk=chunk, loss_chunk=chunk)
    return fxmem.transform(net, Plan(stream=stream, lower=lower))  # type: ignore[arg-type]


@pytest.fixture
def names_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor itself sees torch's own names inside ``everything_in_double``."""
    compile_segment, single = _compat_inductor.compile_segment, torch.float32

    def compiled(*args: Any) -> Any:
        with mock.patch.object(torch, "float32", single), mock.patch.object(torch, "float", single):
            return compile_segment(*args)

    monkeypatch.setattr(_compat_inductor, "compile_segment", compiled)


@pytest.mark.usefixtures("names_restored")
def test_exact_for_every_length_and_compiled_once() -> None:
    with everything_in_double():
        plain = tiny.model("llama").double()
        net = transformed("inductor").double()
        tiny.step(net, tiny.batch(2, 23))
        before = (inductor.STATS.bodies, inductor.STATS.segments)
        assert not inductor.STATS.failed and before[0] >= 4
        for size, length in ((2, 23), (3, 17), (2, 40), (4, 16), (2, 9), (2, 7)):
            loss, grads = tiny.step(net, tiny.batch(size, length))
            want, reference = tiny.step(plain, tiny.batch(size, length))
            assert abs(loss - want) <= 1e-10 * abs(want)
            worst, where = largest_difference(grads, reference)
            assert worst <= 1e-10, (where, size, length)
    assert (inductor.STATS.bodies, inductor.STATS.segments) == before
    assert "compiled" in str(fxmem.explain(net))


@pytest.mark.slow
def test_depth_compiles_nothing() -> None:
    net = transformed("inductor", num_hidden_layers=2)
    tiny.step(net, tiny.batch(2, 23))
    before = inductor.STATS.segments
    deep = transformed("inductor", num_hidden_layers=5)
    tiny.step(deep, tiny.batch(2, 31))
    assert inductor.STATS.segments == before


def test_peak_memory_is_that_of_eager_bodies() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 1024}
    batch, peak = tiny.batch(1, 512), {}
    for lower in ("eager", "inductor"):
        net = transformed(lower, 64, **wide)
        tiny.step(net, batch)
        tiny.step(net, batch)
        peak[lower] = measure.peak_bytes(lambda net=net: tiny.step(net, batch))  # type: ignore[misc]
    assert peak["inductor"] <= 1.05 * peak["eager"]


SCRIPT = """
import tiny, fxmem
from fxmem import inductor
net = fxmem.transform(tiny.model("llama"), fxmem.Plan(stream=fxmem.Stream(chunk=8, loss_chunk=8), lower="inductor"))
tiny.step(net, tiny.batch(2, 23))
assert not inductor.STATS.failed
print(inductor.STATS.segments, inductor.STATS.cached)
"""  # noqa: E501


def test_a_second_process_finds_everything_compiled(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append([int(n) for n in done.stdout.split()])
    (made, cached), (again, found) = counts
    assert made == again == found > 10 and cached < made


def chain() -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    out, x = graph.placeholder("out"), graph.placeholder("x")
    a = graph.call_function(aten.exp.default, (x,))
    b = graph.call_function(aten.neg.default, (a,))
    graph.call_function(runtime.put, (out, b, 0, 0))
    c = graph.call_function(aten.mul.Tensor, (a, b))
    d = graph.call_function(aten.add.Tensor, (c, x))
    graph.call_function(runtime.put, (out, d, 0, 0))
    graph.output(None)
    return graph, [a, b, c, d]


def test_a_write_ends_a_segment_and_dead_memory_is_given() -> None:
    graph, (a, b, c, d) = chain()
    first, second = (p for p in segments(graph) if isinstance(p, Segment))
    assert first.nodes == [a, b] and first.outputs == [a, b] and not first.donated
    assert second.nodes == [c, d] and second.outputs == [d]
    assert second.donated == {a, b}, "x is the caller's"


def test_memory_with_another_reader_is_not_given() -> None:
    graph, (a, b, c, d) = chain()
    (last,) = (n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(last):
        view = graph.call_function(aten.reshape.default, (b, [-1]))
        graph.call_function(runtime.put, (graph.find_nodes(op="placeholder")[0], view, 0, 0))
    second = [p for p in segments(graph) if isinstance(p, Segment)][1]
    assert second.donated == {a}


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_laid_out(order: tuple[int, ...]) -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    y: Tensor = runtime.laid_out(x, order)
    assert torch.equal(x, y) and y.permute(order).is_contiguous()
    assert runtime.laid_out(y, order) is y
