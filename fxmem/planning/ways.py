"""The ways to train that a forecast compares, each as a function of the length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fxmem.memory.budget import needed
from fxmem.plan.plan import Plan, Stream
from fxmem.planning.answer import PARTS
from fxmem.planning.curve import SAMPLES, Curve
from fxmem.planning.devices import Device, Home
from fxmem.planning.modes import Mode
from fxmem.planning.moments import Steps
from fxmem.planning.ranks import steps_of_a_rank
from fxmem.planning.replay import plain_step
from fxmem.planning.streamed import Streamed
from fxmem.planning.weightless import Captured, capture, without_weights
from fxmem.runtime.retention import Kept
from fxmem.streaming.shards import WHOLE, Shards

PLAIN, CHECKPOINTS = "plain autograd", "checkpointing"
STREAM, OFFLOAD = "stream", "stream + offload"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan for one step, and what that step does."""

    plan: Plan
    steps: Steps
    parts: dict[str, int]
    seconds: float
    keeps: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """One method in one mode. ``step``: moments and bytes away of a step, by its length."""

    method: str
    mode: Mode
    step: Callable[[int], tuple[Steps, int]]
    seconds: Callable[[int], float]
    choose: Callable[[int, int], tuple[Kept, Steps, float, list[str]]] | None = None
    home: Home = "disk"

    @property
    def streams(self) -> bool:
        return self.method in (STREAM, OFFLOAD)

    @property
    def base(self) -> int:
        """Bytes that are there before a step."""
        return self.mode.weights + self.mode.state

    def bytes_at(self, length: int) -> int:
        """The peak of a step that keeps the least."""
        return self.base + self.step(length)[0].peak

    def needs(self, length: int) -> int:
        """The memory that it takes to be sure of a step of this length."""
        peak = self.step(length)[0].peak
        return self.base + (needed(peak) if self.streams else peak)

    def away(self, length: int) -> int:
        """Bytes that wait elsewhere meanwhile."""
        return self.step(length)[1]

    def within(self, length: int, memory: int) -> Chosen:
        """The fastest step within ``memory`` bytes."""
        assert self.choose is not None
        _, steps, seconds, keeps = self.choose(length, memory - self.base)
        stream = Stream()
        if self.mode.blocks is None:
            stream = Stream(memory=memory, offload=self.home if self.method == OFFLOAD else "none")
        values = (self.mode.weights, self.mode.state, *steps.largest)
        parts = dict(zip(PARTS, values, strict=True))
        plan = Plan(stream=stream, blocks=self.mode.blocks)
        return Chosen(plan, steps, parts, seconds, tuple(keeps))


def captured(mode: Mode, length: int | None, batch: int) -> Captured:
    """The step that all ways of a mode share."""
    return capture(without_weights(mode.model), length or SAMPLES[1], batch)


def ways_of(
    mode: Mode, caught: Captured, device: Device, batch: int, shards: Shards = WHOLE
) -> list[Way]:
    """What can be compared for a mode, of one rank. Blocks do not offload."""
    graph = caught.graph
    if mode.blocks is not None:
        graph = caught.training({n for n, p in mode.model.named_parameters() if p.requires_grad})
    streamed = Streamed(graph, device)
    plain = _replayed(mode, device, batch, shards, checkpoints=False)
    found = [
        Way(PLAIN, mode, plain, lambda t: streamed.seconds(caught.at(t), None)),
        Way(
            CHECKPOINTS, mode, _replayed(mode, device, batch, shards, checkpoints=True),
            lambda t: streamed.checkpointed(caught.at(t)),
        ),
    ]  # fmt: skip
    for offload in (False, True) if mode.blocks is None else (False,):
        found.append(_streamed(mode, streamed, caught.at, plain, offload=offload))
    return found


def _replayed(
    mode: Mode, device: Device, batch: int, shards: Shards, *, checkpoints: bool
) -> Callable[[int], tuple[Steps, int]]:
    @cache
    def curve() -> Curve:
        def replay(tokens: int) -> Steps:
            found = plain_step(
                mode.model, tokens, batch, checkpoints=checkpoints,
                workspaces=device.kind == "cpu",
            )  # fmt: skip
            return steps_of_a_rank(found, shards, mode.model)

        return Curve(replay)

    return lambda tokens: (curve().at(tokens), 0)


def _streamed(
    mode: Mode, streamed: Streamed, at: Callable[[int], dict[str, int]],
    plain: Callable[[int], tuple[Steps, int]], *, offload: bool,
) -> Way:  # fmt: skip
    whole = streamed.graph.chunker.whole

    @cache
    def step(tokens: int) -> tuple[Steps, int]:
        sizes = at(tokens)
        if whole(sizes):
            return plain(tokens)
        return streamed.step(sizes, streamed.least(sizes, offload=offload))

    def seconds(tokens: int) -> float:
        sizes = at(tokens)
        kept = None if whole(sizes) else streamed.least(sizes, offload=offload)
        return streamed.seconds(sizes, kept, step(tokens)[1])

    def choose(tokens: int, room: int) -> tuple[Kept, Steps, float, list[str]]:
        sizes = at(tokens)
        if whole(sizes):
            return Kept(()), plain(tokens)[0], seconds(tokens), ["a small call runs as it is"]
        if mode.blocks is not None:
            kept = streamed.least(sizes)
        else:
            kept = streamed.within(sizes, room, offload=offload)
            if kept.whole:
                all_kept = streamed.seconds(sizes, None)
                return kept, plain(tokens)[0], all_kept, ["memory for plain autograd: as it is"]
        steps, away = streamed.step(sizes, kept)
        return kept, steps, streamed.seconds(sizes, kept, away), streamed.keeps(kept)

    method = OFFLOAD if offload else STREAM
    return Way(method, mode, step, seconds, choose, streamed.device.home)
