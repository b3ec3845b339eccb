"""A report as text: aligned tables, sizes in MiB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxmem.memory.block_formula import Estimate
from fxmem.memory.predict import Prediction
from fxmem.optional import UsageError
from fxmem.report.block_epoch import BlockEpoch
from fxmem.report.parts import BarrierReport, BufferReport, CompileReport, KernelReport, Seconds
from fxmem.report.role_steps import RegionStep
from fxmem.report.step_picture import draw
from fxmem.streaming.keep_levels import NAMES as LEVELS

if TYPE_CHECKING:
    from fxmem.report.parts import LoopReport, PieceReport, RegionReport

MIB = 2**20


def render(report: Report) -> str:
    """The whole report; the newest call's sizes are used for bytes."""
    if not report.captures:
        head = (
            f"{report.model}: transformed, not run yet\n"
            "Programs are made by the first training step; run one and ask again."
        )
        return "\n\n".join([head, *_blocks(report)])
    parts = [_head(report)]
    if report.regions:
        parts.append(_regions(report.regions))
        parts += _keeps(report.regions)
        parts.append(_loops(report.regions))
    parts += _pieces(report.pieces)
    parts += _blocks(report)
    if report.steps:
        parts.append("\n".join(["regions of the latest step", *map(str, report.steps)]))
    if report.kernels:
        rows = [["kernel", "lower", "matches", "lowered"]]
        rows += [[k.kernel, k.lower, str(k.matches), k.reason or "yes"] for k in report.kernels]
        parts.append(table(rows, right=(2,)))
    parts.append(_barriers(report))
    return "\n\n".join(parts)


def _blocks(report: Report) -> list[str]:
    out = []
    if report.block_bytes is not None:
        out.append(f"bytes of block training, by formula\n{report.block_bytes}")
    if report.blocks is not None:
        out.append(str(report.blocks))
    return out


def mib(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / MIB:.1f} MiB"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows in aligned columns, the first one a heading; ``right``: columns of numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _head(report: Report) -> str:
    sizes = ", ".join(f"{k} = {v}" for k, v in sorted(report.sizes.items()))
    rows = [("sizes", sizes or "not run yet")]
    if report.whole:
        rows.append(("streaming", "none in this call: it is small, or the budget is large"))
    if report.in_parts:
        rows.append(("in parts", report.in_parts))
    if report.predicted is not None:
        p = report.predicted
        rows.append(("predicted peak", f"{mib(p.peak_bytes)} above the parameters"))
        detail = (
            f"{mib(p.parameter_gradient_bytes)} gradients, {mib(p.saved_bytes)} between forward "
            f"and backward, {mib(p.transient_bytes)} for the largest region"
        )
        rows.append(("", detail))
    rows.append(("captures", str(report.captures)))
    rows.append(("distinct programs", str(report.distinct_programs)))
    rows.append(("traces", f"{report.traces} in this process"))
    rows.append(("programs built", f"{report.programs} in this process"))
    rows.append(("chunk bodies run", f"{report.executed_bodies} in this process"))
    s = report.seconds
    rows.append(
        (
            "seconds",
            f"capture {s.capture:.1f} (of it trace {s.trace:.1f}), lower {s.lower:.1f}, "
            f"Dynamo {s.dynamo:.1f}",
        )
    )
    c = report.compiled
    if c.bodies or c.failed:
        rows.append(
            (
                "compiled",
                f"{c.bodies} bodies in {c.segments} segments ({c.shared} share code, "
                f"{c.cached} found on disk), {c.seconds:.1f} s; "
                f"{c.eager_calls} calls as they stand",
            )
        )
        rows += [("not compiled", f"{body}: {why}") for body, why in c.failed.items()]
    if report.dropped:
        rows.append(("dropped outputs", ", ".join(report.dropped)))
    if report.deferred:
        rows.append(("deferred outputs", ", ".join(report.deferred)))
        rows += [("recorded", text) for text in report.recorded]
    width = max(len(k) for k, _ in rows)
    return "\n".join([report.model, *(f"  {k.ljust(width)}  {v}" for k, v in rows)])


def _regions(regions: Sequence[RegionReport]) -> str:
    rows = [["region", "kind", "uses", "chunk", "loops", "modules"]]
    for r in regions:
        counts = [str(n) for n in (r.uses, r.chunk, len(r.loops))]
        rows.append([r.name, r.kind, *counts, _few(r.modules)])
    return table(rows, right=(2, 3, 4))


def _keeps(regions: Sequence[RegionReport]) -> list[str]:
    """Nothing where every region keeps its inputs alone, on the device."""
    if not any(k.level or k.where != "device" for r in regions for k in r.keeps):
        return []
    rows = [["region", "keeps for its backward", "uses", "bytes each", "made again", "waits"]]
    rows += [
        [
            r.name,
            LEVELS[k.level],
            str(k.uses),
            mib(k.bytes),
            f"{k.again:.3f} s",
            f"on the {k.where}",
        ]
        for r in regions
        for k in r.keeps
    ]
    return [table(rows, right=(2, 3, 4))]


def _pieces(pieces: Sequence[PieceReport]) -> list[str]:
    if not pieces:
        return []
    rows = [["runs whole, as it is", "calls", "saved", "seconds", "again in backward", "reason"]]
    rows += [
        [p.name, str(p.calls), mib(p.bytes), f"{p.seconds:.2f}", "yes" if p.checkpointed else "no",
         p.reason]
        for p in pieces
    ]  # fmt: skip
    return [table(rows, right=(1, 2, 3))]


def _few(modules: Sequence[str]) -> str:
    first = modules[0] if modules else "(no module)"
    return first if len(modules) < 2 else f"{first}, and {len(modules) - 1} more"


def _loops(regions: Sequence[RegionReport]) -> str:
    rows = [["region", "program", "order", "ops", "buffers", "accumulators", "largest"]]
    for r in regions:
        for loop in r.loops:
            rows.append(
                [
                    r.name,
                    loop.program,
                    loop.direction,
                    str(loop.ops),
                    _total(loop, "buffer"),
                    _total(loop, "accumulator"),
                    _largest(loop),
                ]  # fmt: skip
            )
    return table(rows, right=(3, 4, 5)) if len(rows) > 1 else "no loops"


def _total(loop: LoopReport, kind: str) -> str:
    found = [b.bytes for b in loop.buffers if b.kind == kind]
    return f"{len(found)}, {mib(sum(found))}" if found else "-"


def _largest(loop: LoopReport) -> str:
    if not loop.buffers:
        return ""
    b = max(loop.buffers, key=lambda b: b.bytes)
    return f"{b.name} {b.shape} {b.dtype}"


def _barriers(report: Report) -> str:
    if not report.barriers:
        return "barriers: none, every op streams"
    rows = [["barrier", "reason", "module", "source"]]
    rows += [[b.op, b.reason, b.module, b.source] for b in report.barriers]
    return table(rows)


@dataclass(slots=True)
class Report:
    """What was captured and how it runs. Counts of traces, bodies and seconds are the process's.

    Attributes:
        model: class of the model, or of what was given.
        sizes: the sizes of the latest call, for which bytes and chunks are shown.
        whole: that call was too small to stream and ran as captured.
        pieces: parts of the model that cannot be captured and run whole, as they are.
        dropped: outputs that do not leave the graph, as shapes.
        deferred: outputs that are not computed in the call, as shapes.
        recorded: the distinct programs of what was done with these, call by call.
        steps: with roles, what each region of the latest call runs, saves and learns, in order.
        block_bytes: with blocks, bytes of training by formula, at the sizes of the latest call.
        blocks: with blocks, the block-epoch that training is in; ``blocks.draw(path)`` draws it.
        predicted_peak_bytes: of forward and backward of one step, above parameters; None before the
            first step, and of a model that is captured in parts.
        in_parts: why the model is captured in parts, and at which line; empty where it is not.
        programs: built in this process: forward, loss and backward, each variant once.
    """

    model: str
    sizes: dict[str, int] = field(default_factory=dict)
    whole: bool = False
    regions: list[RegionReport] = field(default_factory=list)
    pieces: list[PieceReport] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
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
    in_parts: str = ""

    @property
    def loops(self) -> list[LoopReport]:
        """Of all regions, in the order of the model."""
        return [loop for region in self.regions for loop in region.loops]

    @property
    def buffers(self) -> list[BufferReport]:
        """What all loops write."""
        return [buffer for loop in self.loops for buffer in loop.buffers]

    @property
    def barriers(self) -> list[BarrierReport]:
        """Operators that run whole, with the reason of each."""
        return [barrier for region in self.regions for barrier in region.barriers]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def draw(self, path: str | Path) -> None:
        """Write a picture of the latest call: bytes over a step, and what its regions keep.

        Raises:
            UsageError: no call has run yet, or it was too small to stream.
            MissingExtraError: matplotlib is not installed.
            FileError: it cannot be written.
        """
        if self.predicted is None or self.whole:
            raise UsageError(
                "there is no streamed step to draw", advice="run a step, then call explain again"
            )
        draw(self, Path(path))

    def __str__(self) -> str:
        return render(self)
