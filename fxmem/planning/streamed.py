"""A streamed step: its bytes from the ledger that predicts memory, its time from the graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxmem.compiler.step import CompiledGraph
from fxmem.memory.budget import Budget
from fxmem.memory.ledger import Ledger
from fxmem.memory.predict import Saved, Step
from fxmem.memory.predict_roles import RoleStep
from fxmem.memory.shards import GATHERED
from fxmem.plan.plan import Stream
from fxmem.planning.devices import Device
from fxmem.planning.moments import Steps
from fxmem.runtime.retention import Kept
from fxmem.streaming.costs import Cost, cost_of
from fxmem.streaming.keep_levels import NAMES as LEVELS
from fxmem.streaming.keep_levels import made_again
from fxmem.streaming.schedule import backward_nodes


class Streamed:
    """Steps of a captured graph on a device."""

    def __init__(self, graph: CompiledGraph, device: Device) -> None:
        self.device = device
        # its own copy: chunk sizes are those of the device
        self.graph = copy.copy(graph)
        self.graph.chunker = copy.copy(graph.chunker)
        self.graph.chunker.fixed = replace(graph.chunker.fixed, device=torch.device(device.kind))
        self._costs: dict[tuple[Any, ...], Cost] = {}

    def least(self, sizes: Mapping[str, int], *, offload: bool = False) -> Kept:
        """What a step without a budget keeps."""
        kept = self.graph.holding.kept(sizes)
        away = range(len(self.graph.calls)) if offload else ()
        return replace(kept, away=frozenset(away), where=self.device.home)

    def within(self, sizes: Mapping[str, int], room: int, *, offload: bool = False) -> Kept:
        """What the fastest step keeps that takes at most ``room`` bytes.

        Raises:
            MemoryBudgetError: there is none.
        """
        budget = Budget(self.graph, Stream(memory=room))
        budget.device = torch.device(self.device.kind)
        budget.where = self.device.home if offload else None
        return budget.choose(sizes, room, fresh=True)

    def step(self, sizes: Mapping[str, int], kept: Kept) -> tuple[Steps, int]:
        """Its moments, above parameters and inputs, and the bytes that wait elsewhere."""
        kind = _WatchedRoles if self.graph.selected else _Watched
        step = kind(self.graph, sizes, kept)
        step.predict()
        final = {s for leaf, s in step.gradients.items() if leaf[0] == "input"}
        rows = []
        assert isinstance(step.ledger, _Snapshots)
        for alive, extra in step.ledger.taken:
            gradients = sum(size for storage, size in alive if storage in final)
            gathered = sum(size for storage, size in alive if storage[0] in GATHERED)
            saved = sum(size for _, size in alive) - gradients - gathered
            rows.append((gradients, saved, gathered + extra))
        return Steps(np.array(rows, np.int64).reshape(-1, 3)), step.away

    def seconds(self, sizes: Mapping[str, int], kept: Kept | None, away: int = 0) -> float:
        """Of a step, about; None for one that keeps everything. What moves hides behind compute."""
        total = Cost()
        for i in range(len(self.graph.calls)):
            total += self._cost(i, sizes, 3 if kept is None else kept.levels[i])
        busy = total.seconds(self.device.rates)
        return max(busy, 2 * away / self.device.transfer)

    def checkpointed(self, sizes: Mapping[str, int]) -> float:
        """Seconds of a step that runs the forward of every layer once more."""
        return self.seconds(sizes, Kept((-1,) * len(self.graph.calls)))

    def _cost(self, at: int, sizes: Mapping[str, int], level: int) -> Cost:
        """Of one region; ``level`` -1 makes its whole forward again."""
        code = self.graph.calls[at].code
        sizes = self.graph.calls[at].sizes(sizes)
        wanted = self.graph.selected[at].wanted if self.graph.selected else None
        key = (id(code), level, *(wanted or ()), *sorted(sizes.items()))
        if key not in self._costs:
            joint = code.joint
            late = backward_nodes(joint)
            grads = joint.grads if wanted is None else [
                g if w else None for g, w in zip(joint.grads, wanted, strict=False)
            ]  # fmt: skip
            learns = any(g is not None for g in grads)
            needed = _behind([*joint.outputs, *grads])
            cost = cost_of(joint, needed, sizes)
            if learns and not code.early and level < 3:
                early = [n for n in needed if n not in late]
                again = made_again(joint, code.level(level)) if level >= 0 else early
                cost += cost_of(joint, again, sizes)
            self._costs[key] = cost
        return self._costs[key]

    def keeps(self, kept: Kept) -> list[str]:
        """What successive regions do, one line for as many as do the same."""
        lines: list[tuple[str, list[int]]] = []
        for i, (call, level) in enumerate(zip(self.graph.calls, kept.levels, strict=True)):
            if not any(call.code.levels):
                continue  # nothing could be kept
            where = {"cpu": "on the host", "disk": "on the disk"}[kept.where]
            does = f"keep {LEVELS[level]}" + (f", wait {where}" if i in kept.away else "")
            if not lines or lines[-1][0] != does:
                lines.append((does, []))
            lines[-1][1].append(i)
        count = sum(len(found) for _, found in lines)
        return [f"{len(found)} of {count} regions: {does}" for does, found in lines]


def _behind(results: Sequence[fx.Node | None]) -> list[fx.Node]:
    """What is needed for some values of a graph."""
    found: dict[fx.Node, None] = {}
    work = [r for r in results if r is not None]
    while work:
        node = work.pop()
        if node not in found:
            found[node] = None
            work += node.all_input_nodes
    return list(found)


class _Snapshots(Ledger):
    """Remembers what was alive at every mark."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[list[tuple[Any, int]], int]] = []

    def mark(self, label: str, extra: int = 0) -> None:
        super().mark(label, extra)
        self.taken.append((list(self.sizes.items()), extra))


class _Watched(Step):
    """``away``: bytes that wait elsewhere."""

    book = _Snapshots

    def __init__(self, graph: CompiledGraph, sizes: Mapping[str, int], kept: Kept) -> None:
        super().__init__(graph, sizes, kept)
        self.away = 0

    def _save(self, *args: Any) -> Saved:
        saved = super()._save(*args)
        self.away += sum(size for _, size in saved.away)
        return saved


class _WatchedRoles(RoleStep):
    """The same where some parameters learn; nothing waits elsewhere."""

    book, away = _Snapshots, 0

    def __init__(self, graph: CompiledGraph, sizes: Mapping[str, int], kept: Kept) -> None:
        super().__init__(graph, dict(sizes))
