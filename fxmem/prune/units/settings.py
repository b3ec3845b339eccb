"""Everything that a mask search can be told, flat: `Prune` and what its estimator adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fxmem.checks import choice
from fxmem.errors import PlanError

Init = Literal["wanda", "magnitude", "taylor", "random", "uniform"]


def number(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse what is no number in ``[low, high]``, or in ``(low, high]``."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if real and low <= value <= high and not (open_low and value == low):  # type: ignore[operator]
        return
    left = "(" if open_low else "["
    raise PlanError(
        f"{field} is {value!r}", advice=f"allowed values: numbers in {left}{low:g}, {high:g}]"
    )


def count(field: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least `least`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return
    raise PlanError(f"{field} is {value!r}", advice=f"allowed values: integers of at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every search is told: the fields of `Prune`, and three that both estimators have.

    Attributes:
        cost: the budget counts ``"parameters"`` or ``"units"``.
        ranking: the final mask ranks all units together, or each ``"kind"`` under its own budget.
        init_batches: batches that importance is measured on.
    """

    keep: float = 0.5
    kinds: tuple[str, ...] = ()
    steps: int = 40
    init: Init = "taylor"
    round_to: int = 1
    seed: int = 0
    uniform: bool = False
    cost: Literal["parameters", "units"] = "parameters"
    ranking: Literal["joint", "kind"] = "joint"
    init_batches: int = 8

    @property
    def grain(self) -> int:
        """Channels per unit of the search."""
        return 1

    def check(self) -> None:
        """Refuse impossible values."""
        number("Prune.keep", self.keep, 0, 1, open_low=True)
        if isinstance(self.kinds, str) or not all(isinstance(kind, str) for kind in self.kinds):
            raise PlanError(f"Prune.kinds is {self.kinds!r}", advice="give a tuple of kinds")
        if "width" in self.kinds and len(set(self.kinds)) > 1:
            raise PlanError(
                f"Prune.kinds is {self.kinds!r}: units of the width hold parameters of all others",
                advice="search one after the other and compose: second.after(first)",
            )
        if not isinstance(self.uniform, bool):
            raise PlanError(f"Prune.uniform is {self.uniform!r}", advice="True or False")
        count("Prune.steps", self.steps, 0)
        count("Prune.seed", self.seed, 0)
        for field in _COUNTS:
            if hasattr(self, field):
                count(f"Prune.{field}", getattr(self, field), 0 if field == "history" else 1)
        for field, limits in _RANGES.items():
            if hasattr(self, field):
                number(f"Prune.{field}", getattr(self, field), *limits, open_low=limits[0] == 0)
        for field, words in _WORDS.items():
            if hasattr(self, field):
                choice(f"Prune.{field}", getattr(self, field), words, ())

    def __post_init__(self) -> None:
        self.check()


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings(Settings):
    """Of ``estimator="gates"``; see `fxmem.prune.search.gate_loop`.

    Attributes:
        lr: largest move of a score in the first step is three times this; a score starts at the
            logit of its unit's place in the ranking, so 1 is the way from the middle to three
            quarters.
        widen: sub-models hold this times the budget.
        refresh: a new sub-model is built once units worth this part of the budget have moved among
            the best ones from outside the present one.
        batches: batches of a step, whose derivatives are averaged; ranks share them.
    """

    lr: float = 0.3
    widen: float = 1.5
    refresh: float = 0.05
    batches: int = 1

    def __post_init__(self) -> None:
        self.check()
        number("Prune.refresh", self.refresh, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings(Settings):
    """Of ``estimator="score"``; see `fxmem.prune.search.estimator`.

    Attributes:
        block: MLP channels per unit of the search. Single channels make the ratio of a whole layer
            degenerate after one step.
        order: which channels share a block: neighbours in ``"importance"`` (a block is then about
            as good as its channels) or in ``"index"``.
        samples: masks per snapshot, K.
        lr: step size of the preconditioned gradient, at the first step.
        standardise: losses are divided by their spread over past steps, so that `lr` means the
            same for every model and budget.
        decay: ``"cosine"`` lets lr fall to zero over the steps, ``"none"`` keeps it.
        scope: over which units likelihood ratios multiply; see `fxmem.prune.search.estimator`.
        clip: limit of a ratio and of its inverse.
        alpha: exponent of the preconditioner, 1/2 to 1. At 1/2 a step is as noisy for a unit that
            is nearly decided as for an open one; at 1 decided units stand still.
        metric: of the projection onto the budget: ``"preconditioned"``, the step's own, takes a
            step's excess from the open units; ``"euclidean"`` from all alike.
        trust_cap: log second moment of the ratios that one step may add.
        outlier: losses this many spreads above the median of the other samples' are cut to that,
            ``inf`` cuts none; see `fxmem.prune.search.outliers`.
        history: latest masks that a linear control variate is fitted to, 0 for none; see
            `fxmem.prune.search.control_variate`. Fitting takes a time cubic in it, or in the
            units if fewer.
        widen: sub-models are built with every unit's odds times this, and each step draws masks
            inside them by gates on activations; 1 uses the built masks as they are. Sub-models
            are larger (units between keep and drop mostly stay), and a snapshot's steps see masks
            of their own; see `fxmem.prune.search.draw_masks`.
        ess: a block's effective sample fraction below which new masks are drawn.
        age: steps after which new masks are drawn whatever the ESS; 1 is plain policy gradient.
        resident: ``"all"`` keeps the K sub-models, ``"one"`` one at a time over all `age` batches.
        init_scale: steepness of the start: logits are this times the standardised importance.
        epsilon: probabilities stay in [epsilon, 1 - epsilon]: at 0 a unit could never return.
    """

    block: int = 128
    order: Literal["importance", "index"] = "importance"
    samples: int = 4
    lr: float = 0.1
    standardise: bool = True
    decay: Literal["cosine", "none"] = "cosine"
    scope: Literal["full", "layer", "none"] = "layer"
    clip: float = 2.0
    alpha: float = 1.0
    metric: Literal["euclidean", "preconditioned"] = "preconditioned"
    trust_cap: float = 0.4
    outlier: float = 4.0
    history: int = 512
    widen: float = 4.0
    ess: float = 0.5
    age: int = 8
    resident: Literal["all", "one"] = "one"
    init_scale: float = 12.0
    epsilon: float = 0.002

    def __post_init__(self) -> None:
        self.check()
        number("Prune.ess", self.ess, 0, 1)
        number("Prune.epsilon", self.epsilon, 0, 0.4)
        if not isinstance(self.standardise, bool):
            raise PlanError(f"Prune.standardise is {self.standardise!r}", advice="True or False")

    @property
    def grain(self) -> int:
        """Channels per unit of the search."""
        return self.block


_COUNTS = ("round_to", "init_batches", "batches", "block", "samples", "age", "history")
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("lr", "trust_cap", "init_scale", "outlier"), (0, math.inf)),
    "clip": (1, math.inf),
    "widen": (1, 1e6),
    "alpha": (0.5, 1),
}
_WORDS: dict[str, tuple[str, ...]] = {
    "order": ("importance", "index"),
    "decay": ("cosine", "none"),
    "scope": ("full", "layer", "none"),
    "metric": ("euclidean", "preconditioned"),
    "resident": ("all", "one"),
    "init": ("wanda", "magnitude", "taylor", "random", "uniform"),
    "cost": ("parameters", "units"),
    "ranking": ("joint", "kind"),
}
