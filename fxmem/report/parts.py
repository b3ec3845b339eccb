"""The parts of a report."""

from __future__ import annotations

from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True)
class PieceReport:
    """A part of the model that runs whole, as it is: module path, with the method where that is
    another than ``forward``.

    Attributes:
        calls: in one forward.
        bytes: what autograd saves of it, beside its arguments; of its second run in the backward
            where it is ``checkpointed``.
        seconds: its forward. Both at the sizes of the call in which it was found.
    """

    name: str
    calls: int
    bytes: int
    checkpointed: bool
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class KeepReport:
    """What some uses of a region keep from forward to backward.

    Attributes:
        level: of :mod:`fxmem.streaming.keep_levels`.
        positions: of the regions of the call that keep this, in its order.
        bytes: of one of them, with the inputs of the region that its backward reads.
        again: seconds that its backward spends on making the rest again, by the device's rates.
        where: ``"device"``, ``"cpu"`` or ``"disk"``.
    """

    level: int
    positions: tuple[int, ...]
    bytes: int
    again: float
    where: str

    @property
    def uses(self) -> int:
        return len(self.positions)


@dataclass(slots=True)
class RegionReport:
    """One distinct region: ``kind`` is ``loss``, ``mixing`` (it has attention) or ``tokens``;
    ``keeps``: what its uses keep in the latest call, none in a loss.
    """

    name: str
    kind: str
    uses: int
    modules: list[str]
    chunk: int
    loops: list[LoopReport]
    barriers: list[BarrierReport]
    keeps: list[KeepReport]


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
