"""The search loop, over any model that can be instantiated from a mask.

Nothing here knows about networks: a factory turns a bool mask into a function from a batch to a
loss. A snapshot (`fxmem.prune.search.snapshot`) builds K of them; the loop re-weights their
losses until the likelihood ratios are used up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fxmem.errors import BudgetError
from fxmem.prune.search import estimator
from fxmem.prune.search.control_variate import History
from fxmem.prune.search.outliers import against_others, robust_variance
from fxmem.prune.search.projection import project
from fxmem.prune.search.resume import check_same_search
from fxmem.prune.search.snapshot import Alone, Exchange, Factory, Shop, Snapshot
from fxmem.prune.search.spent import Counts
from fxmem.prune.units.settings import ScoreSettings


class Loop:
    """State of one search; `step` updates it once, `state` and `load` store and resume it.

    Args:
        start: importance-based probabilities, float64 (n,); projected here.
        cost: (n,) per unit.
        layer: int (n,), decoder layer of each unit.
        budget: in the unit of `cost`.
        options: the search's options.
        factory: builds a sub-model from a mask.
        batches: measured in turn, from the start again when they are used up.
        exchange: how several ranks share their losses.
        gated: bool (n,), units that a gate can remove from a built sub-model; None for all.

    Raises:
        BudgetError: no unit, no batch, a budget that cannot be met, or K not divisible over ranks.
    """

    def __init__(
        self,
        start: Tensor,
        cost: Tensor,
        layer: Tensor,
        budget: float,
        options: ScoreSettings,
        factory: Factory,
        batches: Sequence[Any],
        exchange: Exchange | None = None,
        gated: Tensor | None = None,
    ) -> None:
        if not len(start) or not len(batches):
            raise BudgetError(
                f"{len(start)} prunable units and {len(batches)} batches",
                advice="a search needs at least one of each",
            )
        self.exchange, self.factory, self.batches = exchange or Alone(), factory, batches
        if options.samples % self.exchange.world:
            raise BudgetError(
                f"{options.samples} masks over {self.exchange.world} ranks",
                advice="samples must be a multiple of the number of ranks",
            )
        self.gated = gated
        self.cost, self.budget, self.options = cost.double(), float(budget), options
        self.block = estimator.scope_blocks(layer, options.scope)
        self.s = project(start.double(), self.cost, self.budget, options.epsilon)
        self.done, self.age = 0, 0
        self.snapshot: Snapshot | None = None
        self.average: float | None = None
        self.spread: float | None = None
        self.history = History(len(start), options.history)
        self.slopes = torch.zeros_like(self.s)
        self.counts = Counts()

    @property
    def probabilities(self) -> Tensor:
        """Keep probability of every search unit, float64 (n,)."""
        return self.s

    # -- one step

    def step(self) -> Tensor:
        """One update of the probabilities; returns the K losses it used."""
        now = self._usable()
        drawn, law = now.inside(self.done, self.s)
        losses = now.losses(self.done, drawn)
        self.age += 1
        self.done += 1
        self.counts.used += len(losses)
        alive = torch.isfinite(losses)
        masks, finite = drawn[alive], losses[alive]
        self.counts.losses.append(float(finite.mean()) if len(finite) else math.nan)
        known = (masks.double() - law) @ self.slopes
        own = self._variance(finite - known)
        if self.spread is None and own > 0:
            self.spread = own
        rest, baseline = self._rest(finite, known)
        self.counts.cut += int((rest < finite - known).sum())
        if baseline is None:
            self.counts.skipped += 1
        else:
            self._update(masks, rest, baseline, law)
        if len(finite):
            # After use: an average that holds the sample's own loss would shrink its gradient.
            mean = float(rest.mean())
            old = mean if self.average is None else self.average
            self.average = 0.8 * old + 0.2 * mean
            if self.spread is not None and len(rest) >= 2:
                self.spread = 0.8 * self.spread + 0.2 * own
            if self.options.history and self.options.widen > 1:
                self.history.add(masks, rest + known, self.done)
            elif self.options.history:
                self.history.note(rest + known, alive)
        return losses

    def _variance(self, rest: Tensor) -> float:
        if len(rest) < 2:
            return 0.0
        return robust_variance(rest) if math.isfinite(self.options.outlier) else float(rest.var())

    def _usable(self) -> Snapshot:
        """The snapshot, or a new one where it is too old or the probabilities have moved away."""
        now, options, number = self.snapshot, self.options, 0
        if now is not None:
            ess = estimator.effective_fraction(self.s, now.law(self.s), self.block)
            if self.age < options.age and ess >= options.ess:
                return now
            self.counts.ess.append(ess)
            number = now.number + 1
            if options.history:
                self.history.close(now.masks, now.number)
                self.slopes = self.history.fit()
        self.exchange.agree(self.s)
        s0 = self.s.clamp(options.epsilon, 1 - options.epsilon)
        self.snapshot = now = Snapshot(self._shop(), s0, number, self.done)
        self.age = 0
        self.counts.instantiations += 1
        self.counts.submodels += options.samples
        self.counts.size += float((now.masks.double() @ self.cost).sum() / self.cost.sum())
        now.instantiate()
        return now

    def _shop(self) -> Shop:
        own = (self.options, self.factory, self.batches, self.exchange, self.counts)
        return Shop(*own, self.gated)

    def _rest(self, finite: Tensor, known: Tensor) -> tuple[Tensor, Tensor | None]:
        """Losses without outliers and control variate, and their baselines if there are any."""
        rest, others = finite - known, None
        if len(finite) >= 2 and self.spread and math.isfinite(self.options.outlier):
            width = self.options.outlier * math.sqrt(self.spread)
            rest, others = against_others(finite, known, width)
        elif len(finite) >= 2:
            others = estimator.leave_one_out(rest)
        if others is not None:
            return rest, others
        if not len(rest) or self.average is None:
            # One loss and no history: nothing says whether it is good or bad.
            return rest, None
        return rest, torch.full_like(rest, self.average)

    def _update(self, masks: Tensor, losses: Tensor, baseline: Tensor, law: Tensor) -> None:
        options, s, block = self.options, self.s, self.block
        logs = estimator.log_ratio(masks, s, law, block)
        self.counts.clipped.append(estimator.clipped_fraction(logs, options.clip))
        slope = estimator.gradient(
            masks, losses, baseline, s, law, block, clip=options.clip, alpha=options.alpha
        )
        slope += self.slopes * estimator.variance(s) ** options.alpha
        weight = None if options.metric == "euclidean" else estimator.variance(s) ** options.alpha
        if options.standardise and self.spread:
            slope /= math.sqrt(self.spread)
        moved = s - self._rate() * slope
        delta = project(moved, self.cost, self.budget, options.epsilon, weight) - s
        self.s = s + estimator.trust(delta, s, block, options.trust_cap) * delta
        moment = float(estimator.log_second_moment(self.s, law, block).max())
        self.counts.cap = max(self.counts.cap, moment)

    def _rate(self) -> float:
        if self.options.decay == "none":
            return self.options.lr
        return (
            self.options.lr * 0.5 * (1 + math.cos(math.pi * (self.done - 1) / self.options.steps))
        )

    # -- store and resume

    def state(self) -> dict[str, Any]:
        """Everything a resumed search needs, as tensors and plain values."""
        now = self.snapshot
        return {
            "s": self.s.clone(),
            "done": self.done,
            "snapshot": None if now is None else [now.s0, now.number, now.begin, now.table],
            "age": self.age,
            "average": self.average,
            "spread": self.spread,
            "history": self.history.state(),
            "slopes": self.slopes,
            "counts": asdict(self.counts),
            "options": repr(self.options),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`: the same probabilities as without the interruption.

        Raises:
            BudgetError: the state is of another search.
        """
        check_same_search(state, self.options, len(self.s))
        self.s, self.done, self.age = state["s"].clone(), state["done"], state["age"]
        self.average, self.spread = state["average"], state["spread"]
        self.history.load(state["history"])
        self.slopes = state["slopes"].clone()
        self.counts = Counts(**state["counts"])
        if state["snapshot"] is not None:
            self.snapshot = Snapshot(self._shop(), *state["snapshot"])
            if self.options.resident == "all":
                self.snapshot.instantiate()
