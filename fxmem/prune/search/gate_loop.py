"""The search by gates: scores of units, moved by derivatives from a stale, wider sub-model.

Every unit has a score, and the mask is the best units that the budget pays for. A step runs one
forward and backward inside a sub-model that holds the units of the mask and the next best, the
latter behind closed gates (`fxmem.prune.shrink.gate_gradients`), and moves each score against the
derivative by its gate, per parameter. The mask is 0 or 1 in the forward while its derivative goes
straight through to the scores (straight-through: arXiv 1308.3432; for pruned units: 2604.19398).

Building is rare: a sub-model serves steps until the best mask has moved out of it. So gradients are
those of an outdated sub-model, as in the abstract of "Computation and Memory-Efficient Model
Compression with Gradient Reweighting"; a deterministic mask has no likelihood to re-weight by, and
what is not in the sub-model keeps the score it had.

Nothing here knows about networks: `build` turns a mask into a function from a batch and a mask to a
loss and its derivatives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fxmem.errors import BudgetError
from fxmem.prune.search.resume import check_same_search
from fxmem.prune.search.snapshot import Alone, Exchange
from fxmem.prune.search.space import Space, quantiles, standardise
from fxmem.prune.search.spent import Counts
from fxmem.prune.units.settings import GateSettings

Derivatives = Callable[[Any, Tensor], tuple[float, Tensor]]
"""Of a batch and a mask, bool (n,): the loss, and its derivative by every unit, float64 (n,)."""
LIMIT = 3.0
"""Largest move of one step, in medians of the first step's."""


class GateLoop:
    """State of one search; `step` updates it once, `state` and `load` store and resume it.

    Args:
        space: the search units.
        importance: per group (size,), what the scores start from.
        options: the search's options.
        build: makes a sub-model from a mask over search units.
        batches: measured in turn, from the start again when they are used up.
        exchange: how several ranks share the batches of a step.
        gated: bool (n,), units that a gate can close; the others are all open in a sub-model.

    Raises:
        BudgetError: no unit, no batch, or batches of a step that the ranks cannot share.
    """

    def __init__(
        self, space: Space, importance: Mapping[str, Tensor], options: GateSettings,
        build: Callable[[Tensor], Derivatives], batches: Sequence[Any],
        exchange: Exchange | None, gated: Tensor,
    ) -> None:  # fmt: skip
        self.exchange, self.build, self.batches = exchange or Alone(), build, batches
        if not len(space.cost) or not len(batches):
            raise BudgetError(
                f"{len(space.cost)} prunable units and {len(batches)} batches",
                advice="a search needs at least one of each",
            )
        if options.batches % self.exchange.world:
            raise BudgetError(
                f"{options.batches} batches of a step over {self.exchange.world} ranks",
                advice='set advanced={"batches": a multiple of the number of ranks}',
            )
        self.space, self.options, self.gated = space, options, gated
        self.s = torch.zeros_like(space.cost)
        if options.init != "uniform":
            values = space.pool(standardise(space, importance, options.init))
            self.s = torch.logit(quantiles(values, space.cost))
        self.built: Tensor | None = None
        self.model: Derivatives | None = None
        self.scale: float | None = None
        self.done = 0
        self.counts = Counts()

    @property
    def probabilities(self) -> Tensor:
        """Scores as numbers in (0, 1)."""
        return torch.sigmoid(self.s)

    def step(self) -> float:
        """One update of the scores; returns the loss."""
        inside = self._usable()
        loss, slope = self._measure(inside)
        self.done += 1
        self.counts.losses.append(loss)
        if not math.isfinite(loss) or not bool(slope.isfinite().all()):
            self.counts.skipped += 1
            return loss
        self.counts.used += self.options.batches
        assert self.built is not None
        gain = -slope / self.space.cost
        if self.scale is None:
            seen = gain[self.built & (gain != 0)].abs()
            self.scale = float(seen.median()) * LIMIT if len(seen) else 1.0
        move = (gain / self.scale).clamp(-LIMIT, LIMIT)
        move -= self._drift(move, inside)
        rate = 0.5 * (1 + math.cos(math.pi * (self.done - 1) / self.options.steps))
        self.s = torch.where(self.built, self.s + self.options.lr * rate * move, self.s)
        return loss

    def _drift(self, move: Tensor, inside: Tensor) -> Tensor:
        """The mean move of the units behind closed gates: those outside are taken to move alike.

        A smaller model misses almost every unit, so without this all that is in it would rise above
        what was left out, which has no derivative to rise by.
        """
        assert self.built is not None
        closed = self.built & ~inside
        some = closed if bool(closed.any()) else self.built
        return (move * self.space.cost)[some].sum() / self.space.cost[some].sum()

    def final(self) -> Tensor:
        """The mask that the search would end with now, bool (n,)."""
        return self.space.final(self.s, self.options)

    def _usable(self) -> Tensor:
        """The mask of this step, in a sub-model that holds it."""
        keep = min(1.0, self.options.keep * self.options.widen)
        best = self.final()
        # the best first: what only filled the smaller budget might not be in a wider choice
        first = torch.where(best, math.inf, self.s)
        wide = self.space.final(first, replace(self.options, keep=keep))
        wanted = torch.where(self.gated, wide, best)
        if self.built is not None:
            outside = float(self.space.cost @ (wanted & ~self.built).double())
            if outside > self.options.refresh * float(self.space.cost @ best.double()):
                self.built = self.model = None
        if self.built is None:
            self.exchange.agree(self.s)
            self.built = wanted
            self.counts.instantiations += 1
            self.counts.size += float(self.space.cost @ wanted.double()) / self.space.budget_base
        if self.model is None:
            begin = time.perf_counter()
            self.model = self.build(self.built)
            self.counts.submodels += 1
            self.counts.building += time.perf_counter() - begin
        low = torch.where(self.built, self.s, -math.inf)
        mask = self.space.final(low, self.options) & self.built
        return torch.where(self.gated, mask, self.built)

    def _measure(self, mask: Tensor) -> tuple[float, Tensor]:
        """Mean loss and derivatives over the batches of this step, shared by the ranks."""
        assert self.model is not None
        first, count = self.done * self.options.batches, self.options.batches
        rows = []
        begin = time.perf_counter()
        for k in range(self.exchange.rank, count, self.exchange.world):
            batch = self.batches[(first + k) % len(self.batches)]
            loss, slope = self.model(batch, mask)
            rows.append(torch.cat([torch.tensor([loss], dtype=torch.float64), slope]))
        self.counts.running += time.perf_counter() - begin
        self.counts.forwards += count
        every = self.exchange.losses(torch.stack(rows)).mean(0)
        return float(every[0]), every[1:]

    # -- store and resume

    def state(self) -> dict[str, Any]:
        """Everything a resumed search needs, as tensors and plain values."""
        return {
            "s": self.s.clone(),
            "built": None if self.built is None else self.built.clone(),
            "scale": self.scale,
            "done": self.done,
            "counts": asdict(self.counts),
            "options": repr(self.options),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`: the same scores as without the interruption.

        Raises:
            BudgetError: the state is of another search.
        """
        check_same_search(state, self.options, len(self.s))
        self.s, self.done, self.scale = state["s"].clone(), state["done"], state["scale"]
        self.built = None if state["built"] is None else state["built"].clone()
        self.counts = Counts(**state["counts"])
