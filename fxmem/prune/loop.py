"""The search loop, over any model that can be instantiated from a mask.

Nothing here knows about networks: a factory turns a bool mask into a function from a batch to a
loss. Building that sub-model is the expensive line; the loop builds K of them per snapshot and
re-weights their losses until the likelihood ratios are used up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from fxmem.errors import BudgetError
from fxmem.prune import estimator
from fxmem.prune.control import History
from fxmem.prune.counts import Counts
from fxmem.prune.draws import draw, nested, widened
from fxmem.prune.options import Prune
from fxmem.prune.outliers import against_others, robust_variance
from fxmem.prune.projection import project

Loss = Callable[..., float]
"""Of a batch; where masks are nested, of a batch and the mask inside the sub-model's own."""
Factory = Callable[[Tensor], Loss]


class Exchange(Protocol):
    """How ranks share the losses of their masks; see `fxmem.prune.distributed`."""

    rank: int
    world: int

    def losses(self, local: Tensor) -> Tensor:
        """All ranks' rows of a (K / world, T) table, as (K, T), row k from rank k % world."""

    def agree(self, s: Tensor) -> None:
        """Raise where the ranks' probabilities differ."""


class Alone:
    """One process."""

    rank, world = 0, 1

    def losses(self, local: Tensor) -> Tensor:
        """The table as it is."""
        return local

    def agree(self, s: Tensor) -> None:
        """Nothing to compare with."""


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

    Raises:
        BudgetError: no unit, no batch, a budget that cannot be met, or K not divisible over ranks.
    """

    def __init__(
        self,
        start: Tensor,
        cost: Tensor,
        layer: Tensor,
        budget: float,
        options: Prune,
        factory: Factory,
        batches: Sequence[Any],
        exchange: Exchange | None = None,
    ) -> None:
        if not len(start) or not len(batches):
            raise BudgetError(
                f"{len(start)} prunable units and {len(batches)} batches",
                advice="a search needs at least one of each",
            )
        self.exchange = exchange or Alone()
        if options.samples % self.exchange.world:
            raise BudgetError(
                f"{options.samples} masks over {self.exchange.world} ranks",
                advice="Prune.samples must be a multiple of the number of ranks",
            )
        self.cost, self.budget, self.options = cost.double(), float(budget), options
        self.factory, self.batches = factory, batches
        self.block = estimator.scope_blocks(layer, options.scope)
        self.s = project(start.double(), self.cost, self.budget, options.epsilon)
        self.s0 = self.s.clone()
        self.wide = self.s.clone()
        self.masks = torch.zeros(0, len(start), dtype=torch.bool)
        self.done, self.snapshot, self.age = 0, 0, 0
        self.average: float | None = None
        self.spread: float | None = None
        self.history = History(len(start), options.history)
        self.slopes = torch.zeros_like(self.s)
        self.counts = Counts()
        self._table: Tensor | None = None
        self._live: list[Loss] = []

    # -- one step

    def step(self) -> Tensor:
        """One update of the probabilities; returns the K losses it used."""
        if self._worn_out():
            self._refresh()
        drawn, law = self._inside(self.age)
        losses = self._losses(drawn)
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

    def _worn_out(self) -> bool:
        if not len(self.masks) or self.age >= self.options.age:
            return True
        return self._effective() < self.options.ess

    def _effective(self) -> float:
        """Smallest effective sample fraction of any block, were the next step taken now."""
        return estimator.effective_fraction(self.s, self._law(), self.block)

    def _law(self) -> Tensor:
        """Probabilities of the masks that the next step uses.

        Where sub-models stay, masks inside them are drawn at the probabilities of the moment;
        where they run one at a time over all batches, at those of the snapshot.
        """
        here = self.options.widen > 1 and self.options.resident == "all"
        return torch.minimum(self.s, self.wide) if here else self.s0

    def _inside(self, step: int) -> tuple[Tensor, Tensor]:
        """The masks of one step of the snapshot, bool (K, n), and their probabilities."""
        law, options = self._law(), self.options
        if options.widen == 1:
            return self.masks, law
        return nested(self.wide, self.masks, law, options.seed, self.snapshot - 1, step)

    def _refresh(self) -> None:
        options, exchange = self.options, self.exchange
        if len(self.masks):
            self.counts.ess.append(self._effective())
        if options.history:
            self.history.close(self.masks, self.snapshot)
            self.slopes = self.history.fit()
        exchange.agree(self.s)
        self.s0 = self.s.clamp(options.epsilon, 1 - options.epsilon)
        self._draw(self.snapshot)
        self.snapshot += 1
        self.age = 0
        self.counts.instantiations += 1
        self.counts.submodels += options.samples
        self._table, self._live = None, []
        self._instantiate()

    def _draw(self, snapshot: int) -> None:
        seed, samples = self.options.seed, self.options.samples
        self.wide = widened(self.s0, self.options.widen) if self.options.widen > 1 else self.s0
        self.masks = torch.stack([draw(self.wide, seed, snapshot, k) for k in range(samples)])

    def _instantiate(self) -> None:
        mine = self.masks[self.exchange.rank :: self.exchange.world]
        if self.options.resident == "all":
            self._live = [self._build(mask) for mask in mine]
            return
        # Weights stand still, so losses do not depend on s: one sub-model at a time runs over all
        # the batches of the snapshot, and only scalars stay.
        last = min(self.options.age, self.options.steps - self.done)
        inside = [
            self._inside(t)[0][self.exchange.rank :: self.exchange.world] for t in range(last)
        ]
        rows = []
        for k, mask in enumerate(mine):
            submodel = self._build(mask)
            rows.append([self._measure(submodel, t, inside[t][k]) for t in range(last)])
            del submodel
        self._table = self.exchange.losses(torch.tensor(rows, dtype=torch.float64))
        self.counts.forwards += self._table.numel()

    def _build(self, mask: Tensor) -> Loss:
        begin = time.perf_counter()
        submodel = self.factory(mask)
        self.counts.building += time.perf_counter() - begin
        return submodel

    def _measure(self, submodel: Loss, ahead: int, mask: Tensor) -> float:
        batch = self.batches[(self.done + ahead) % len(self.batches)]
        begin = time.perf_counter()
        loss = float(submodel(batch, mask) if self.options.widen > 1 else submodel(batch))
        self.counts.running += time.perf_counter() - begin
        return loss

    def _losses(self, drawn: Tensor) -> Tensor:
        if self._table is not None:
            return self._table[:, self.age]
        mine = drawn[self.exchange.rank :: self.exchange.world]
        pairs = zip(self._live, mine, strict=True)
        local = torch.tensor([[self._measure(x, 0, m)] for x, m in pairs], dtype=torch.float64)
        everything = self.exchange.losses(local)[:, 0]
        self.counts.forwards += len(everything)
        return everything

    def _rest(self, finite: Tensor, known: Tensor) -> tuple[Tensor, Tensor | None]:
        """Losses without outliers and control variate, and their baselines if there are any."""
        rest, others = finite - known, None
        if len(finite) >= 2 and self.spread and math.isfinite(self.options.outlier):
            width = self.options.outlier * math.sqrt(self.spread)
            rest, others = against_others(finite, known, width)
        elif len(finite) >= 2:
            others = estimator.leave_one_out(rest)
        if others is not None and self.options.baseline == "loo":
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
        if options.trust == "strict":
            scale = estimator.trust_strict(delta, s, law, block, options.trust_cap)
        else:
            scale = estimator.trust(delta, s, block, options.trust_cap)
        self.s = s + scale * delta
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
        return {
            "s": self.s.clone(),
            "s0": self.s0.clone(),
            "done": self.done,
            "snapshot": self.snapshot,
            "age": self.age,
            "average": self.average,
            "spread": self.spread,
            "history": self.history.state(),
            "slopes": self.slopes,
            "table": self._table,
            "counts": asdict(self.counts),
            "options": self.options.to_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`: the same probabilities as without the interruption.

        Raises:
            BudgetError: the state is of another search.
        """
        if state["options"] != self.options.to_dict() or len(state["s"]) != len(self.s):
            raise BudgetError(
                "the checkpoint is of a search with other options or units",
                advice="resume with the same options and model, or delete the checkpoint",
            )
        self.s, self.s0 = state["s"].clone(), state["s0"].clone()
        self.done, self.snapshot, self.age = state["done"], state["snapshot"], state["age"]
        self.average, self.spread = state["average"], state["spread"]
        self._table = state["table"]
        self.history.load(state["history"])
        self.slopes = state["slopes"].clone()
        self.counts = Counts(**state["counts"])
        if self.snapshot:
            self._draw(self.snapshot - 1)
            if self.options.resident == "all":
                self._instantiate()
