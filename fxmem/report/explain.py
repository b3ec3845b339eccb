"""What fxmem did with a model, as data and as text: :func:`explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from fxmem import api
from fxmem._compat import graph as _compat
from fxmem.axes.sizes import evaluate_shape, with_chunks
from fxmem.backends.inductor import STATS
from fxmem.backends.lowering import matches
from fxmem.blocks.attach import state_of
from fxmem.compiler.step import CompiledGraph
from fxmem.errors import NotTransformedError
from fxmem.frontend.capture import canonical_shape
from fxmem.frontend.dropped_outputs import Dropped
from fxmem.frontend.late_outputs import Late
from fxmem.memory.block_formula import estimate
from fxmem.memory.budget import kept_bytes, saved_bytes
from fxmem.memory.device import rates
from fxmem.memory.predict import predict
from fxmem.memory.predict_roles import predict_roles
from fxmem.program.steps import Buffer, Loop, Program
from fxmem.report.block_epoch import block_epoch
from fxmem.report.parts import (
    BarrierReport,
    BufferReport,
    CompileReport,
    KeepReport,
    KernelReport,
    LoopReport,
    PieceReport,
    RegionReport,
    Seconds,
)
from fxmem.report.role_steps import known_regions, region_steps
from fxmem.report.text import Report
from fxmem.runtime.counters import COUNTER
from fxmem.runtime.region_call import RegionCall
from fxmem.runtime.region_code import RegionCode
from fxmem.streaming.costs import cost_of
from fxmem.streaming.keep_levels import made_again


def explain(model: nn.Module | api.Backend) -> Report:
    """What fxmem does with a transformed model, or with what a backend has compiled.

    Raises:
        NotTransformedError: the model was not transformed.
    """
    if isinstance(model, api.Backend):
        engine, name = model, "backend"
    else:
        model = api.unwrapped(model)
        name = type(model).__name__
        found = api._TRANSFORMED.get(model) if isinstance(model, nn.Module) else None
        if found is None:
            raise NotTransformedError(f"{name} was not transformed")
        engine = found
    recorded = [] if engine.recorder is None else list(engine.recorder.programs.values())
    made = [] if engine.recorder is None else engine.recorder.graphs()
    report = _report(name, engine.graphs, made)
    report.recorded = [p.summary for p in recorded]
    if isinstance(model, nn.Module) and engine.plan.blocks is not None:
        dtype = next(model.parameters()).dtype
        latest = next((g for g in reversed(engine.graphs) if g.sizes), None)
        tokens = 2048 if latest is None else latest.chunker.tokens(latest.sizes)
        report.block_bytes = estimate(model, engine.plan.blocks, tokens, dtype=dtype)
    opaque = engine.opaque()
    report.pieces = [] if opaque is None else [
        PieceReport(str(p), len(p.calls), p.saved_bytes, p.checkpointed, p.seconds, p.reason)
        for p in opaque.pieces if p.calls
    ]  # fmt: skip
    if engine.parts.reason is not None:
        # a prediction is of one graph
        report.in_parts, report.predicted, report.predicted_peak_bytes = (
            engine.parts.reason, None, None
        )  # fmt: skip
    _add_steps(report, engine, model)
    return report


def _add_steps(report: Report, engine: api.Backend, model: nn.Module | api.Backend) -> None:
    names = {p: n for n, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
    regions = []
    for graph in [g for g in engine.graphs if g.sizes and g.selected][-1:]:
        calls = [
            (c.modules, c.leaves, graph.chunk(i), c.sizes(graph.sizes))
            for i, c in enumerate(graph.calls)
        ]
        given = (calls, graph.selected, names)
        report.steps, regions = region_steps(*given), known_regions(*given)
    if isinstance(model, nn.Module) and engine.plan.blocks is not None:
        report.blocks = block_epoch(state_of(model), model, regions)


def _report(
    name: str, graphs: Sequence[CompiledGraph], recorded: Sequence[CompiledGraph]
) -> Report:
    """``recorded``: what was made of the deferred outputs of ``graphs``."""
    report = Report(
        name, captures=len(graphs), traces=COUNTER.traces, programs=COUNTER.programs,
        executed_bodies=COUNTER.bodies,
        whole_calls=sum(g.whole_calls for g in graphs),
    )  # fmt: skip
    inside = COUNTER.capture_seconds
    dynamo = max(0.0, _compat.compile_times() - inside)
    report.seconds = Seconds(inside, COUNTER.trace_seconds, COUNTER.lower_seconds, dynamo)
    report.compiled = CompileReport(**asdict(STATS))
    report.kernels = [
        KernelReport(kernel, lower, count, reason)
        for (lower, kernel, reason), count in matches().items()
    ]
    latest = next((g for g in reversed(graphs) if g.sizes), None)
    if latest is not None:
        report.sizes = dict(latest.sizes)
        small = latest.chunker.whole(latest.sizes)
        report.whole = (small or latest.kept.whole) and not latest.selected
    if latest is not None:
        how = predict_roles if latest.selected else predict
        report.predicted = how(latest, latest.sizes)
        report.predicted_peak_bytes = report.predicted.peak_bytes
    calls: dict[int, list[tuple[CompiledGraph, RegionCall]]] = {}
    for graph in graphs:
        report.dropped += _absent(graph, Dropped)
        report.deferred += _absent(graph, Late)
    for graph in (*graphs, *recorded):
        for call in graph.calls:
            calls.setdefault(id(call.code), []).append((graph, call))
    report.dropped = list(dict.fromkeys(report.dropped))
    report.deferred = list(dict.fromkeys(report.deferred))
    report.regions = [_region(uses) for uses in calls.values()]
    report.distinct_programs = len(calls)
    return report


def _absent(graph: CompiledGraph, kind: type[Dropped] | type[Late]) -> list[str]:
    """Shapes of the outputs of one kind that a call does not compute."""
    return [
        _shape(canonical_shape(o.value, graph.capture.symbols))
        for o in graph.capture.outputs
        if isinstance(o, kind)
    ]


def _region(uses: list[tuple[CompiledGraph, RegionCall]]) -> RegionReport:
    graph, call = uses[-1]
    code = call.code
    kind = "loss" if code.is_loss else "tokens"
    if kind == "tokens" and any(p.masks or _reads_all(p) for p in code.programs.values()):
        kind = "mixing"
    own = call.sizes(graph.sizes) if graph.sizes else {}
    at = next(i for i, c in enumerate(graph.calls) if c is call)
    chunk = min(own.get("T", 0), graph.chunk(at)) if own else 0
    sizes = with_chunks(own, chunk)
    rows = sizes if graph.together is None else graph.together.of_a_rank(sizes)
    loops = [
        LoopReport(
            label, "descending" if loop.descending else "ascending",
            len(_targets(loop)),
            [_buffer(b, rows if b.local else sizes) for b in loop.allocate],
        )
        for label, program in _programs(code)
        for loop in program.loops
    ]  # fmt: skip
    modules = list(dict.fromkeys(c.modules for _, c in uses if c.modules))
    barriers = _barriers(code, modules)
    return RegionReport(code.name, kind, len(uses), modules, chunk, loops, barriers, _keeps(uses))


def _keeps(uses: list[tuple[CompiledGraph, RegionCall]]) -> list[KeepReport]:
    """Of the latest call, by level and place."""
    graph, call = uses[-1]
    code, sizes = call.code, graph.sizes
    if not code.learns or code.early or not sizes or graph.chunker.whole(sizes):
        return []
    kept = graph.holding.moved() if graph.selected else graph.expected(sizes)
    if kept.whole:
        return []
    at: dict[tuple[int, bool], list[int]] = {}
    for i, one in enumerate(graph.calls):
        if one.code is code:
            at.setdefault((kept.levels[i], i in kept.away), []).append(i)
    with_rows = with_chunks(call.sizes(sizes), graph.chunker(call, sizes, shrink=kept.shrink))
    found = []
    for (level, away), positions in sorted(at.items()):
        again = made_again(code.joint, code.level(level))
        size = sum(kept_bytes(code, with_rows, level)) + sum(saved_bytes(call, with_rows, again))
        seconds = cost_of(code.joint, again, with_rows).seconds(rates(code.device).compute)
        where = kept.where if away else "device"
        found.append(KeepReport(level, tuple(positions), size, seconds, where))
    return found


def _programs(code: RegionCode) -> list[tuple[str, Program]]:
    named = {key: key[0].replace("+", ", keeping level ") for key in code.programs}
    return [(named[k] if k[1] else f"{named[k]} (any mask)", p) for k, p in code.programs.items()]


def _reads_all(program: Program) -> bool:
    return any(_attends(loop) for loop in program.loops)


def _attends(loop: Loop) -> bool:
    return any(str(getattr(t, "__module__", "")).endswith("attention") for t in _targets(loop))


def _targets(loop: Loop) -> list[Any]:
    return [n.target for n in loop.module.graph.nodes if n.op == "call_function"]


def _buffer(buffer: Buffer, sizes: dict[str, int]) -> BufferReport:
    count = 0
    with contextlib.suppress(KeyError):
        count = buffer.dtype.itemsize
        for d in evaluate_shape(buffer.shape, sizes):
            count *= d
    kind = "accumulator" if buffer.zero else "buffer"
    dtype = str(buffer.dtype).removeprefix("torch.")
    return BufferReport(buffer.name, kind, _shape(buffer.shape), dtype, count)


def _barriers(code: RegionCode, modules: Sequence[str]) -> list[BarrierReport]:
    """An op that autograd made has no module of its own; the region's says where to look."""
    derived = f"backward of {modules[0]}" if modules else "backward"
    found = {
        BarrierReport(b.op, b.reason, b.module or derived, b.source or ""): None
        for b in code.barriers
    }
    return list(found)


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(d) for d in shape) + "]"


__all__ = ["BarrierReport", "BufferReport", "LoopReport", "RegionReport", "Report", "explain"]
