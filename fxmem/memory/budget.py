"""The fastest step within a budget of bytes: which region keeps what, and what waits elsewhere.

Every region has a few options: a level of what it keeps (:mod:`fxmem.streaming.keep_levels`), on
the device or away from it. An option costs seconds (ops that its backward runs again, bytes that no
compute hides) and bytes at some moments of the step. The moments come from a replay of the step
that keeps nothing (:mod:`fxmem.memory.predict`); "no moment exceeds the budget" and "one option per
region" make an integer program, which :func:`scipy.optimize.milp` solves. The answer is replayed in
turn, and must fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import fx

from fxmem.axes.sizes import byte_count, evaluate, with_chunks
from fxmem.checks import byte_size
from fxmem.compiler.step import CompiledGraph
from fxmem.errors import FxmemWarning, MemoryBudgetError
from fxmem.memory.device import available, optimizer_bytes, own_bytes, rates
from fxmem.memory.predict import Step, has_loss, predict_whole
from fxmem.plan.plan import Stream
from fxmem.runtime.offload import SMALLEST
from fxmem.runtime.region_call import RegionCall
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.retention import Kept
from fxmem.runtime.sharding import current
from fxmem.streaming.costs import cost_of
from fxmem.streaming.keep_levels import made_again
from fxmem.streaming.schedule import backward_nodes

MARGIN, SLACK = 1.02, 1 << 20
"""Measured peaks are at most this times predicted ones, and these bytes."""
GAP, SECONDS = 1e-3, 5.0
"""A choice is taken that is this near to the best, or the best after this time."""
SHRINK = (1, 2, 4, 8)
"""Where no choice fits, automatic chunks become shorter by these factors in turn."""
SCALE = 2**20
"""The solver counts in MiB: numbers of very different sizes upset it."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a region.

    Attributes:
        seconds: more than with everything at hand.
        between: bytes from its forward to its backward, more than with level 0 on the device.
        forward: bytes during its forward, more than with level 0.
        moving: bytes on their way while the region after it runs.
    """

    level: int
    away: bool
    seconds: float
    between: int
    forward: int = 0
    moving: int = 0


class Budget:
    """What the calls of one graph keep, by their sizes; each answer is found once."""

    def __init__(self, graph: CompiledGraph, stream: Stream) -> None:
        self.graph, self.stream, self.least = graph, stream, graph.holding
        self.device = graph.calls[0].code.device if graph.calls else torch.device("cpu")
        self.where = _where(stream, self.device)
        self._known: dict[tuple[Any, ...], Kept] = {}
        self._plain: dict[tuple[Any, ...], dict[int, int]] = {}

    def to_run(self, sizes: Mapping[str, int], fresh: bool) -> Kept:
        """As :meth:`kept`."""
        return self.kept(sizes, fresh)

    def moved(self) -> Kept:
        """Everything that can wait elsewhere."""
        count = len(self.graph.calls)
        every = frozenset(range(count) if self.where else ())
        return Kept((0,) * count, every, self.where or "disk")

    def kept(self, sizes: Mapping[str, int], fresh: bool = True) -> Kept:
        """What a call of these sizes keeps; ``fresh``: no parameter has a gradient yet.

        Raises:
            MemoryBudgetError: no choice fits; says what the least is.
        """
        if self.stream.memory == "least":
            # results of attention that are held on the device are free; on their way back they cost
            handed = tuple(int(c.code.hands_on) for c in self.graph.calls)
            return replace(self.moved(), levels=handed) if self.where else self.least.kept(
                sizes, fresh
            )  # fmt: skip
        auto = self.stream.memory == "auto"  # decided once: what is free changes all the time
        room = 0 if auto else self._room() >> 20 << 20
        key = (fresh, room, self.graph.late_working(sizes), *sorted(sizes.items()))
        if key not in self._known:
            room = available(self.device) if auto else room
            self._known[key] = self.choose(sizes, room, fresh)
        return self._known[key]

    def _room(self) -> int:
        """Bytes that a step may take above what is there before it."""
        budget = byte_size("Stream.memory", self.stream.memory)
        if self.device.type != "cpu":
            module = torch.get_device_module(self.device)
            return budget - int(module.memory_allocated(self.device))
        weights = self.graph.weights()
        there = sum(map(own_bytes, weights)) + optimizer_bytes(weights)
        return budget - there - sum(own_bytes(w.grad) for w in weights if w.grad is not None)

    def choose(self, sizes: Mapping[str, int], room: int, fresh: bool) -> Kept:
        """The fastest choice that takes ``room`` bytes at most; ``fresh`` as in :meth:`kept`.

        Raises:
            MemoryBudgetError: no choice fits.
        """
        if self._plain_fits(sizes, room):
            return Kept((0,) * len(self.graph.calls), whole=True)
        for shrink in SHRINK:
            kept, peak = self._fastest(sizes, room, fresh, shrink)
            if needed(peak) <= room:
                break
        return self._fits(kept, sizes, peak, room)

    def _plain_fits(self, sizes: Mapping[str, int], room: int) -> bool:
        """Plain autograd takes no more than ``room`` bytes; then nothing is faster.

        A replay takes a second or more, so one that fits answers for shorter lengths, and one that
        does not for longer ones.
        """
        graph, stream = self.graph, self.stream
        auto = (stream.chunk, stream.loss_chunk) == ("auto", "auto")
        if not auto or any(graph.borders.nodes) or current() or not has_loss(graph):
            return False
        rest = tuple((k, v) for k, v in sorted(sizes.items()) if k != "T")
        known, length = self._plain.setdefault(rest, {}), sizes.get("T", 1)
        if any(t >= length and peak <= room for t, peak in known.items()):
            return True
        if any(t <= length and peak > room for t, peak in known.items()):
            return False
        known[length] = needed(predict_whole(graph, sizes).peak_bytes)
        return known[length] <= room

    def _fastest(
        self, sizes: Mapping[str, int], room: int, fresh: bool, shrink: int
    ) -> tuple[Kept, int]:
        """With the predicted peak; the least where nothing fits."""
        made: dict[tuple[Any, ...], list[Option]] = {}
        options = []
        for i, call in enumerate(self.graph.calls):
            key = (id(call.code), call.length, *call.movable)  # alive as long as the graph
            if key not in made:
                made[key] = self._options(i, sizes, shrink)
            options.append(made[key])
        lowest = self._kept([o[0] for o in options], shrink)
        marks = Step(self.graph, sizes, lowest, fresh=fresh).marks()
        limit = int((room - SLACK) / MARGIN)
        while True:
            chosen = _solve(options, marks, limit)
            least = [min(o, key=lambda v: v.between) for o in options]
            kept = self._kept(chosen or least, shrink)
            peak = Step(self.graph, sizes, kept, fresh=fresh).predict().peak_bytes
            over = needed(peak) - room
            if over <= 0 or chosen is None:
                return kept, peak
            limit -= over + (1 << 16)

    def _kept(self, chosen: Sequence[Option], shrink: int) -> Kept:
        away = frozenset(i for i, o in enumerate(chosen) if o.away)
        return Kept(tuple(o.level for o in chosen), away, self.where or "disk", shrink)

    def _fits(self, kept: Kept, sizes: Mapping[str, int], peak: int, room: int) -> Kept:
        peak = needed(peak)
        if peak <= room:
            return kept
        there = 0
        if self.stream.memory != "auto":
            there = byte_size("Stream.memory", self.stream.memory) - room
        raise MemoryBudgetError(
            f"a step of {sizes.get('T', 1)} tokens takes at least {_text(there + peak)}, "
            f"{_text(there)} of them weights and states, and the budget is {_text(there + room)}"
        )

    def _options(self, at: int, sizes: Mapping[str, int], shrink: int) -> list[Option]:
        """What it can keep, the least first; no program is built for it.

        A forward takes at most the bytes of what it keeps besides, and a backward that makes less
        again takes no more than one that makes all.
        """
        call, device = self.graph.calls[at], rates(self.device)
        code = call.code
        if not code.learns or code.is_loss:
            return [Option(0, False, 0.0, 0)]
        out: list[Option] = []
        own = with_chunks(call.sizes(sizes), self.graph.chunker(call, sizes, shrink=shrink))
        compute = cost_of(code.joint, code.joint.graph.nodes, own).seconds(device.compute)
        least = 0
        for level in range(1 if code.hands_on else 0, len(code.levels)):
            again = made_again(code.joint, code.level(level))
            seconds = cost_of(code.joint, again, own).seconds(device.compute)
            kept, saved = kept_bytes(code, own, level), saved_bytes(call, own, again)
            least = least or sum(saved)
            more = sum(kept) + sum(saved) - least
            out.append(Option(level, False, seconds, more, sum(kept)))
            moved = sum(b for b in (*kept, *saved) if b >= SMALLEST)
            if self.where is not None and moved:
                wait = max(0.0, 2 * moved / device.transfer[self.where] - compute)
                out.append(replace(
                    out[-1], away=True, seconds=seconds + wait, between=more - moved, moving=moved
                ))  # fmt: skip
        return out


def _where(stream: Stream, device: torch.device) -> str | None:
    """The home of what is moved away; None where nothing is."""
    if stream.offload == "cpu" and device.type == "cpu":
        text = 'Stream(offload="cpu") moves nothing: the model is on the CPU; take "disk"'
        warnings.warn(text, FxmemWarning, stacklevel=2)
        return None
    if stream.offload == "auto":
        if stream.memory == "least":
            return None
        return "disk" if device.type == "cpu" else "cpu"
    return None if stream.offload == "none" else stream.offload


def needed(peak: int) -> int:
    """Bytes to be sure of a step with this predicted peak."""
    return int(peak * MARGIN) + SLACK


def kept_bytes(code: RegionCode, sizes: Mapping[str, int], level: int) -> list[int]:
    """Of each value that a level keeps."""
    infos = [code.joint.info[n] for n in code.level(level)]
    return [evaluate(byte_count(i.shape, i.dtype), sizes) for i in infos]


def saved_bytes(
    call: RegionCall, sizes: Mapping[str, int], again: Collection[fx.Node]
) -> list[int]:
    """Of each value of another region that a backward reads which runs these ops again."""
    joint = call.code.joint
    late = backward_nodes(joint)
    read = {
        a for n in joint.graph.nodes if (n in late or n in again) and n.op == "call_function"
        for a in n.all_input_nodes
    }  # fmt: skip
    infos = [
        joint.info[n] for n, movable in zip(joint.inputs, call.movable, strict=True)
        if movable and n in read
    ]  # fmt: skip
    return [evaluate(byte_count(i.shape, i.dtype), sizes) for i in infos]


def _solve(
    options: Sequence[Sequence[Option]], marks: Sequence[tuple[int, int]], limit: int
) -> list[Option] | None:
    """The fastest choice; None where none fits.

    ``marks``: position in the step and bytes alive there. Region i of n runs its forward at i and
    its backward at 2n - 1 - i.
    """
    regions, last = len(options), 2 * len(options) - 1
    flat = [(i, o) for i, some in enumerate(options) for o in some]
    rows = np.zeros((len(marks), len(flat)))
    for column, (i, option) in enumerate(flat):
        end = last - i
        for row, (at, _) in enumerate(marks):
            if at == i:
                rows[row, column] = option.forward
            elif i < at <= end:
                moving = option.moving if at in (i + 1, end - 1, end) else 0
                rows[row, column] = option.between + moving
    one = np.array([[float(i == region) for i, _ in flat] for region in range(regions)])
    room = np.array([limit - alive for _, alive in marks], dtype=float)
    found = milp(
        np.array([o.seconds for _, o in flat]), integrality=np.ones(len(flat), dtype=int),
        bounds=Bounds(0, 1), options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        constraints=[
            LinearConstraint(rows / SCALE, -np.inf, room / SCALE), LinearConstraint(one, 1, 1)
        ],
    )  # fmt: skip
    if found.x is None:
        return None
    return [o for (_, o), x in zip(flat, found.x, strict=True) if x > 0.5]


def _text(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
