"""The sub-models of one snapshot of the probabilities: their masks, and what they measure.

Building a sub-model is the expensive line of a search. A snapshot builds K of them once and serves
steps until the loop finds that the probabilities have moved too far from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fxmem.prune.search.draw_masks import draw, nested, widened
from fxmem.prune.search.spent import Counts
from fxmem.prune.units.settings import ScoreSettings

Loss = Callable[..., float]
"""Of a batch; where masks are nested, of a batch and the mask inside the sub-model's own."""
Factory = Callable[[Tensor], Loss]


class Exchange(Protocol):
    """How ranks share the losses of their masks; see `fxmem.prune.search.ranks`."""

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


@dataclass
class Shop:
    """What every snapshot of a search shares: where sub-models come from and what they cost."""

    options: ScoreSettings
    factory: Factory
    batches: Sequence[Any]
    exchange: Exchange
    counts: Counts
    gated: Tensor | None = None
    """bool (n,), units that a gate can remove; None for all."""

    def build(self, mask: Tensor) -> Loss:
        """One sub-model; bool (n,)."""
        begin = time.perf_counter()
        submodel = self.factory(mask)
        self.counts.building += time.perf_counter() - begin
        return submodel

    def measure(self, submodel: Loss, step: int, mask: Tensor) -> float:
        """Loss on the batch of a step of the search."""
        batch = self.batches[step % len(self.batches)]
        begin = time.perf_counter()
        loss = float(submodel(batch, mask) if self.options.widen > 1 else submodel(batch))
        self.counts.running += time.perf_counter() - begin
        return loss


@dataclass
class Snapshot:
    """Masks drawn at `s0` and the sub-models they made.

    Attributes:
        shop: of the search.
        s0: probabilities of the snapshot, float64 (n,).
        number: which snapshot of the search, from 0; seeds its draws.
        begin: steps of the search done when it was made.
        wide: probabilities that the sub-models are built with (n,), `s0` unless they are widened.
        masks: bool (K, n), drawn at `wide`.
        table: float64 (K, T) where sub-models ran one at a time over all batches.
    """

    shop: Shop
    s0: Tensor
    number: int
    begin: int
    table: Tensor | None = None
    wide: Tensor = field(init=False)
    masks: Tensor = field(init=False)
    live: list[Loss] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        o = self.shop.options
        self.wide = self._only_gated(widened(self.s0, o.widen)) if o.widen > 1 else self.s0
        self.masks = torch.stack(
            [draw(self.wide, o.seed, self.number, k) for k in range(o.samples)]
        )

    def instantiate(self) -> None:
        """Build this rank's sub-models, and measure them where they do not stay."""
        shop, o = self.shop, self.shop.options
        mine = self._own(self.masks)
        if o.resident == "all":
            self.live = [shop.build(mask) for mask in mine]
            return
        # Weights stand still, so losses do not depend on s: one sub-model at a time runs over all
        # the batches of the snapshot, and only scalars stay.
        steps = range(self.begin, min(self.begin + o.age, o.steps))
        inside = [self._own(self.inside(t, self.s0)[0]) for t in steps]
        rows = []
        for k, mask in enumerate(mine):
            submodel = shop.build(mask)
            rows.append(
                [shop.measure(submodel, t, m[k]) for t, m in zip(steps, inside, strict=True)]
            )
            del submodel
        self.table = shop.exchange.losses(torch.tensor(rows, dtype=torch.float64))
        shop.counts.forwards += self.table.numel()

    def law(self, s: Tensor) -> Tensor:
        """Probabilities of the masks that a step at `s` uses: float64 (n,).

        Where sub-models stay, masks inside them are drawn at the probabilities of the moment, as
        far as the wide ones allow; else at those of the snapshot.
        """
        o = self.shop.options
        if o.widen == 1 or o.resident == "one":
            return self.s0
        return self._only_gated(torch.minimum(s, self.wide))

    def inside(self, step: int, s: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of one step of the search at `s`, bool (K, n), and their probabilities."""
        o, law = self.shop.options, self.law(s)
        if o.widen == 1:
            return self.masks, law
        return nested(self.wide, self.masks, law, o.seed, self.number, step - self.begin)

    def losses(self, step: int, masks: Tensor) -> Tensor:
        """Losses of all ranks' masks from `inside` on the batch of a step: float64 (K,)."""
        if self.table is not None:
            return self.table[:, step - self.begin]
        pairs = zip(self.live, self._own(masks), strict=True)
        local = [[self.shop.measure(submodel, step, mask)] for submodel, mask in pairs]
        everything = self.shop.exchange.losses(torch.tensor(local, dtype=torch.float64))[:, 0]
        self.shop.counts.forwards += len(everything)
        return everything

    def _only_gated(self, s: Tensor) -> Tensor:
        gated = self.shop.gated
        return s if gated is None else torch.where(gated, s, self.s0)

    def _own(self, rows: Tensor) -> Tensor:
        return rows[self.shop.exchange.rank :: self.shop.exchange.world]
