"""What fxmem did with a model, as data and as text: :func:`explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from fxmem import _compat, api
from fxmem.blocks.attach import state_of
from fxmem.blocks.epoch import BlockEpoch, block_epoch
from fxmem.blocks.estimate import Estimate, estimate
from fxmem.blocks.predict import predict_roles
from fxmem.blocks.report import RegionStep, known_regions, region_steps
from fxmem.capture import canonical_shape
from fxmem.compiled import COUNTER, CompiledGraph, Dropped, RegionCall
from fxmem.errors import NotTransformedError
from fxmem.explain_text import render
from fxmem.inductor import STATS
from fxmem.lowering import matches
from fxmem.memory import Prediction, predict
from fxmem.program import Buffer, Loop, Program
from fxmem.region_code import RegionCode
from fxmem.sizes import evaluate_shape


@dataclass(frozen=True, slots=True)
class BufferReport:
    """A tensor that a program allocates: ``kind`` is ``buffer`` or ``accumulator``."""

    name: str
    kind: str
    shape: str
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class LoopReport:
    """One loop over chunks; ``direction`` is ``ascending`` or ``descending``."""

    program: str
    direction: str
    ops: int
    buffers: list[BufferReport]


@dataclass(frozen=True, slots=True)
class BarrierReport:
    """An op that runs whole, and why."""

    op: str
    reason: str
    module: str
    source: str


@dataclass(slots=True)
class RegionReport:
    """One distinct region: ``kind`` is ``loss``, ``mixing`` (it has attention) or ``tokens``;
    ``holds``: how many of its uses hold results of attention from forward to backward.
    """

    name: str
    kind: str
    uses: int
    modules: list[str]
    chunk: int
    loops: list[LoopReport]
    barriers: list[BarrierReport]
    holds: int


@dataclass(slots=True)
class Seconds:
    """Time so far in this process; ``capture`` includes tracing, ``dynamo`` is Dynamo's share."""

    capture: float = 0.0
    trace: float = 0.0
    lower: float = 0.0
    dynamo: float = 0.0


@dataclass(slots=True)
class CompileReport:
    """Chunk bodies that Inductor compiled in this process.

    Attributes:
        bodies: distinct bodies.
        segments: their runs of plain operators.
        shared: of these, how many take the code of another one.
        compiled: graphs given to Inductor.
        cached: of these, found compiled on disk.
        seconds: spent on them, in the first step.
        eager_calls: segments that ran as they stand, for sizes that were not compiled for.
        failed: bodies that could not be compiled and run as they stand, with the reason.
    """

    bodies: int = 0
    segments: int = 0
    shared: int = 0
    compiled: int = 0
    cached: int = 0
    seconds: float = 0.0
    eager_calls: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Matches of a kernel in chunk bodies of this process; ``reason``: why they were not lowered,
    empty where they were.
    """

    kernel: str
    lower: str
    matches: int
    reason: str


@dataclass(slots=True)
class Report:
    """What was captured and how it runs. Counts of traces, bodies and seconds are the process's.

    Attributes:
        model: class of the model, or of what was given.
        sizes: the sizes of the latest call, for which bytes and chunks are shown.
        whole: that call was too small to stream and ran as captured.
        dropped: outputs that do not leave the graph, as shapes.
        steps: with roles, what each region of the latest call runs, saves and learns, in order.
        block_bytes: with blocks, bytes of training by formula, at the sizes of the latest call.
        blocks: with blocks, the block-epoch that training is in; ``blocks.draw(path)`` draws it.
        predicted_peak_bytes: of forward and backward of one step, above parameters; None before the
            first step.
        programs: built in this process: forward, loss and backward, each variant once.
    """

    model: str
    sizes: dict[str, int] = field(default_factory=dict)
    whole: bool = False
    regions: list[RegionReport] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    predicted_peak_bytes: int | None = None
    predicted: Prediction | None = None
    captures: int = 0
    distinct_programs: int = 0
    steps: list[RegionStep] = field(default_factory=list)
    block_bytes: Estimate | None = None
    blocks: BlockEpoch | None = None
    traces: int = 0
    programs: int = 0
    executed_bodies: int = 0
    whole_calls: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    compiled: CompileReport = field(default_factory=CompileReport)
    kernels: list[KernelReport] = field(default_factory=list)

    @property
    def loops(self) -> list[LoopReport]:
        return [loop for region in self.regions for loop in region.loops]

    @property
    def buffers(self) -> list[BufferReport]:
        return [buffer for loop in self.loops for buffer in loop.buffers]

    @property
    def barriers(self) -> list[BarrierReport]:
        return [barrier for region in self.regions for barrier in region.barriers]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return render(self)


def explain(model: nn.Module | api.Backend) -> Report:
    """What fxmem does with a transformed model, or with what a backend has compiled.

    Raises:
        NotTransformedError: the model was not transformed.
    """
    if isinstance(model, api.Backend):
        engine, name = model, "backend"
    else:
        name = type(model).__name__
        found = api._TRANSFORMED.get(model) if isinstance(model, nn.Module) else None
        if found is None:
            raise NotTransformedError(f"{name} was not transformed")
        engine = found
    report = _report(name, engine.graphs)
    if isinstance(model, nn.Module) and engine.plan.blocks is not None:
        dtype = next(model.parameters()).dtype
        tokens = report.sizes.get("B", 1) * report.sizes.get("T", 2048)
        report.block_bytes = estimate(model, engine.plan.blocks, tokens, dtype=dtype)
    _add_steps(report, engine, model)
    return report


def _add_steps(report: Report, engine: api.Backend, model: nn.Module | api.Backend) -> None:
    names = {p: n for n, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
    regions = []
    for graph in [g for g in engine.graphs if g.sizes and g.selected][-1:]:
        calls = [(c.modules, c.leaves, graph.chunk(i)) for i, c in enumerate(graph.calls)]
        given = (calls, graph.selected, graph.sizes, names)
        report.steps, regions = region_steps(*given), known_regions(*given)
    if isinstance(model, nn.Module) and engine.plan.blocks is not None:
        report.blocks = block_epoch(state_of(model), model, regions)


def _report(name: str, graphs: Sequence[CompiledGraph]) -> Report:
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
        report.whole = latest.chunker.whole(latest.sizes) and not latest.selected
    if latest is not None:
        how = predict_roles if latest.selected else predict
        report.predicted = how(latest, latest.sizes)
        report.predicted_peak_bytes = report.predicted.peak_bytes
    calls: dict[int, list[tuple[CompiledGraph, RegionCall]]] = {}
    for graph in graphs:
        report.dropped += [
            _shape(canonical_shape(o.value, graph.capture.symbols))
            for o in graph.capture.outputs
            if isinstance(o, Dropped)
        ]
        for call in graph.calls:
            calls.setdefault(id(call.code), []).append((graph, call))
    report.dropped = list(dict.fromkeys(report.dropped))
    report.regions = [_region(uses) for uses in calls.values()]
    report.distinct_programs = len(calls)
    return report


def _region(uses: list[tuple[CompiledGraph, RegionCall]]) -> RegionReport:
    graph, call = uses[-1]
    code = call.code
    kind = "loss" if code.is_loss else "tokens"
    if kind == "tokens" and any(p.masks or _reads_all(p) for p in code.programs.values()):
        kind = "mixing"
    length = graph.sizes.get("T", 0)
    chunk = min(length, graph.chunker(code, graph.sizes)) if graph.sizes else 0
    loops = [
        LoopReport(
            label, "descending" if loop.descending else "ascending",
            len(_targets(loop)),
            [_buffer(b, graph.sizes) for b in loop.allocate],
        )
        for label, program in _programs(code)
        for loop in program.loops
    ]  # fmt: skip
    modules = list(dict.fromkeys(c.modules for _, c in uses if c.modules))
    barriers = _barriers(code, modules)
    holds = sum(_holds(graph, call) for graph, call in uses)
    return RegionReport(code.name, kind, len(uses), modules, chunk, loops, barriers, holds)


def _holds(graph: CompiledGraph, call: RegionCall) -> bool:
    if not graph.sizes or graph.selected or graph.chunker.whole(graph.sizes):
        return False
    return any(graph.calls[i] is call for i in graph.holding(graph.sizes))


def _programs(code: RegionCode) -> list[tuple[str, Program]]:
    named = {key: key[0].replace("+", ", holding") for key in code.programs}
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
