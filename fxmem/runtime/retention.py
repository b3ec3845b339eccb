"""Which regions hold the dear values of their forward (:mod:`fxmem.streaming.token_mixing`):
where it costs no peak.

Early in the backward there is room: the gradients that fill the memory at its end do not exist yet.
So the last regions, whose backward comes first, hold theirs, as many as leave the largest moment of
the step where it was. A call is taken to be one forward with its backward.

States that are handed from chunk to chunk are always held: they are small, and without them the
backward begins with one more loop, which makes them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from fxmem.axes.sizes import evaluate_shape, has_axis, with_chunks
from fxmem.frontend.capture import canonical_shape
from fxmem.plan.plan import Stream
from fxmem.streaming.chunk_size import Chunker
from fxmem.streaming.shards import Shards

if TYPE_CHECKING:
    from fxmem.runtime.region_call import RegionCall
    from fxmem.runtime.region_code import RegionCode

FORMS = ("forward", "forward+1", "backward", "backward+1")


@dataclass(frozen=True, slots=True)
class Kept:
    """What one call keeps for its backward.

    Attributes:
        levels: per region, the level of what it keeps (:mod:`fxmem.streaming.keep_levels`).
        away: regions whose saved tensors wait off the device (:mod:`fxmem.runtime.offload`).
        where: they wait: ``"cpu"`` or ``"disk"``.
        shrink: automatic chunks are shorter by this factor.
        whole: it keeps what plain autograd keeps, and runs as captured.
    """

    levels: tuple[int, ...]
    away: frozenset[int] = frozenset()
    where: str = "disk"
    shrink: int = 1
    whole: bool = False


class Retention(Protocol):
    """Decides what a call keeps."""

    def kept(self, sizes: Mapping[str, int], fresh: bool = True) -> Kept:
        """``fresh``: no parameter has a gradient yet."""

    def to_run(self, sizes: Mapping[str, int], fresh: bool) -> Kept:
        """The same for the call about to run, which may have to compile more."""

    def moved(self) -> Kept:
        """Of a call whose parameters have roles: no level, but what waits off the device."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes around one region's backward (or the forward of a loss, which takes its gradients).

    Attributes:
        saved: inputs of the region that wait for its backward.
        held: what it could hold besides.
        working: alive only while it runs.
        gradients: alive afterwards, until the end of the step.
    """

    saved: float
    held: float
    working: float
    gradients: float


def choose(moments: Sequence[Moment], *, accumulates: bool = True) -> frozenset[int]:
    """Positions of the regions that hold, last ones first, without a higher peak.

    ``accumulates``: gradients of earlier regions pile up as the backward goes on; False where
    they are added to gradients that are there already.
    """
    levels = _levels(moments, accumulates)
    peak = max(levels, default=0.0)
    chosen: set[int] = set()
    for i in reversed(range(len(moments))):
        # it waits from the forward of region i to its backward: while all later ones run
        if max(levels[i:]) + moments[i].held > peak:
            break
        levels[i:] = [level + moments[i].held for level in levels[i:]]
        if moments[i].held:
            chosen.add(i)
    return frozenset(chosen)


def _levels(moments: Sequence[Moment], accumulates: bool) -> list[float]:
    """Bytes alive at the worst of each region's backward, with nothing held."""
    waiting, done = sum(m.saved for m in moments), 0.0
    levels = [0.0] * len(moments)
    for i in reversed(range(len(moments))):
        levels[i] = waiting + done + moments[i].working + moments[i].gradients
        waiting -= moments[i].saved
        done += moments[i].gradients if accumulates else 0.0
    return levels


class Holding:
    """Which regions of a capture hold, for the sizes of a call; each answer is found once.

    ``late``: who tells what is run between forward and backward, while it is there.
    """

    def __init__(
        self, calls: Sequence[RegionCall], chunker: Chunker, stream: Stream | None,
        late: Callable[[], Callable[[Mapping[str, int]], Moment | None] | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.calls, self.chunker, self.late = calls, chunker, late
        self.off = stream is None or stream.hold == "none"
        self.known: dict[tuple[Any, ...], frozenset[int]] = {}
        self.uses = Counter(id(c.code) for c in calls)

    def kept(self, sizes: Mapping[str, int], fresh: bool = True) -> Kept:
        """What a call of these sizes keeps; ``fresh``: no parameter has a gradient yet."""
        return self._first_level(self(sizes, fresh))

    def to_run(self, sizes: Mapping[str, int], fresh: bool) -> Kept:
        """What the call about to run keeps.

        Until programs that compile at their first call have run in both forms, some regions hold
        and some do not, so that no later length compiles anything.
        """
        chosen = self(sizes, fresh)
        waiting = set() if self.off else {id(c.code) for c in self.calls if _waits(c.code)}
        for code in waiting:
            uses = [i for i, c in enumerate(self.calls) if id(c.code) == code]
            if len(uses) > 1 and not chosen & set(uses):
                chosen |= {uses[-1]}
            elif len(uses) > 1 and chosen >= set(uses):
                chosen -= {uses[0]}
        return self._first_level(chosen)

    def moved(self) -> Kept:
        """Nothing: all stays where it is."""
        return self._first_level(frozenset())

    def _first_level(self, chosen: frozenset[int]) -> Kept:
        return Kept(tuple(int(i in chosen) for i in range(len(self.calls))))

    def __call__(self, sizes: Mapping[str, int], fresh: bool = True) -> frozenset[int]:
        """``fresh``: no parameter has a gradient yet."""
        if self.off:
            return frozenset()
        moment = self.late()
        late = None if moment is None else moment(sizes)
        key = (fresh, late, *sorted(sizes.items()))
        if key not in self.known:
            self._build()
            found = moments(self.calls, sizes, self.chunker)
            found = [
                m if self._able(c.code) else replace(m, held=0)
                for m, c in zip(found, self.calls, strict=True)
            ]
            found += [late] if late is not None else []
            always = {i for i, c in enumerate(self.calls) if c.code.hands_on and self._able(c.code)}
            self.known[key] = choose(found, accumulates=fresh) | always
        return self.known[key]

    def _able(self, code: RegionCode) -> bool:
        """One use alone cannot compile both forms in the first call."""
        return not code.lowering.late or self.uses[id(code)] > 1

    def _build(self) -> None:
        """All programs now: another length may need those that this one does not."""
        for code in {id(c.code): c.code for c in self.calls if c.code.held}.values():
            for kind in FORMS:
                code.program(kind)


def _waits(code: RegionCode) -> bool:
    """Some form compiles when it first runs, and has not."""
    return bool(code.held) and code.lowering.late and not all(map(code.has_compiled, FORMS))


def moments(
    calls: Sequence[RegionCall], sizes: Mapping[str, int], chunker: Chunker
) -> list[Moment]:
    """One per region."""
    ledger = _Once()
    every = [with_chunks(c.sizes(sizes), chunker(c, sizes)) for c in calls]
    late = [
        _late(c, own, chunker.working(c, sizes), ledger, chunker.shards)
        for c, own in zip(reversed(calls), reversed(every), strict=True)
    ]
    out = []
    for call, own, (working, gradients) in zip(calls, every, reversed(late), strict=True):
        code = call.code
        held = sum(_bytes(code.joint.info[n], own) for n in code.held)
        saved = _saved(call, own, ledger)
        if code.hands_on:
            saved, held = saved + held, 0
        out.append(Moment(saved, held, working, gradients))
    return out


class _Once:
    """Tensors that several regions use are counted where they are met first."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def __call__(self, *key: Any) -> bool:
        new = key not in self.seen
        self.seen.add(key)
        return new


def _saved(call: RegionCall, sizes: Mapping[str, int], first: _Once) -> int:
    code = call.code
    if not code.learns or code.early:
        return 0
    kept = zip(call.leaves, code.values, code.saved(False), strict=True)
    return sum(
        _bytes(value, sizes, code.region.capture.symbols)
        for leaf, value, keep in kept
        if keep and leaf[0] == "main" and first("saved", leaf)
    )


def _late(
    call: RegionCall, sizes: Mapping[str, int], chunk: float, first: _Once, shards: Shards
) -> tuple[float, float]:
    """Bytes while the region's gradients are taken: working, and gradients that stay; ``chunk``:
    bytes that one chunk takes."""
    code = call.code
    if not code.learns:
        return 0.0, 0.0
    program = code.program("loss" if code.early else "backward")
    grads = program.outputs[len(code.joint.outputs) if code.early else 0 :]
    gradients, sums, whole = 0, 0, 0
    for leaf, value, name in zip(call.leaves, code.values, grads, strict=True):
        if name is not None and leaf[0] == "input":
            own = _bytes(value, sizes, code.region.capture.symbols)
            sums += own
            part = shards.share(leaf[1], own)
            whole += own - part
            gradients += part if first("gradient", leaf) else 0
    buffers = [b for loop in program.loops for b in loop.allocate]
    states = sum(_bytes(b, sizes) for b in buffers if any(has_axis(d) for d in b.shape))
    # the rest are sums: gradients of parameters, in float32 or wider
    wider = sum(_bytes(b, sizes) for b in buffers if not any(has_axis(d) for d in b.shape)) - sums
    working = states + max(0, wider) + chunk + whole
    if not code.early and not program.overwrites:
        joint = code.joint
        working += sum(_bytes(joint.info[t], sizes) for t in joint.tangents if t is not None)
    return working, gradients


def _bytes(value: Any, sizes: Mapping[str, int], symbols: Any = None) -> int:
    """Of a tensor, or of what is known of one."""
    shape = value.shape if symbols is None else canonical_shape(value, symbols)
    count: int = value.dtype.itemsize
    for size in evaluate_shape(shape, sizes):
        count *= size
    return count
