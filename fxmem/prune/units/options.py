"""Options of the mask search, as plain values that are checked when they are built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxmem.checks import choice, mapping, refuse_unknown
from fxmem.errors import PlanError


def _number(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if real and low <= value <= high and not (open_low and value == low):  # type: ignore[operator]
        return
    left = "(" if open_low else "["
    raise PlanError(
        f"{field} is {value!r}", advice=f"allowed values: numbers in {left}{low:g}, {high:g}]"
    )


def _count(field: str, value: object, least: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return
    raise PlanError(f"{field} is {value!r}", advice=f"allowed values: integers of at least {least}")


@refuse_unknown
@dataclass(frozen=True, slots=True)
class Prune:
    """How `fxmem.search` finds which units to keep.

    Attributes:
        keep: fraction of the prunable parameters that stays, in (0, 1].
        kinds: kinds of units to prune: ``"kv_groups"``, ``"mlp_channels"``, ``"experts"``, and
            whole ``"attention_blocks"``, ``"mlp_blocks"`` or ``"layers"``. Empty for heads and
            channels (of all experts of a layer together). Kinds that hold the same weights, such
            as experts and their channels, would be paid for twice and cannot be mixed;
            so ``"width"``, the channels of the residual stream, is searched alone.
        block: MLP channels per unit of the search. Single channels make the ratio of a whole layer
            degenerate after one step.
        order: which channels share a block: neighbours in ``"importance"`` (a block is then about
            as good as its channels) or in ``"index"``.
        steps: updates of the probabilities; one batch each.
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
        trust: log second moment of the ratios that one step may add (``"step"``) or that all steps
            since the snapshot may reach (``"strict"``); the size is `trust_cap`.
        baseline: ``"loo"``, mean of the other samples' losses, or ``"ema"`` of past losses.
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
        init: importance the probabilities start from; "taylor" needs one backward per batch.
        init_batches: batches that importance is measured on.
        init_scale: steepness of the start: logits are this times the standardised importance.
        epsilon: probabilities stay in [epsilon, 1 - epsilon]: at 0 a unit could never return.
        cost: the budget counts ``"parameters"`` or ``"units"``.
        ranking: the final mask ranks all units together, or each ``"kind"`` under its own budget.
        round_to: kept channels per layer are a multiple of this.
        seed: of every mask; equal seeds give equal masks on any number of ranks.

    Raises:
        PlanError: for an unknown option or an impossible value.
    """

    keep: float = 0.5
    kinds: tuple[str, ...] = ()
    block: int = 128
    order: Literal["importance", "index"] = "importance"
    steps: int = 200
    samples: int = 4
    lr: float = 0.1
    standardise: bool = True
    decay: Literal["cosine", "none"] = "cosine"
    scope: Literal["full", "layer", "none"] = "layer"
    clip: float = 2.0
    alpha: float = 1.0
    metric: Literal["euclidean", "preconditioned"] = "preconditioned"
    trust: Literal["step", "strict"] = "step"
    trust_cap: float = 0.4
    baseline: Literal["loo", "ema"] = "loo"
    outlier: float = 4.0
    history: int = 512
    widen: float = 4.0
    ess: float = 0.5
    age: int = 8
    resident: Literal["all", "one"] = "one"
    init: Literal["wanda", "magnitude", "taylor", "random", "uniform"] = "wanda"
    init_batches: int = 8
    init_scale: float = 12.0
    epsilon: float = 0.002
    cost: Literal["parameters", "units"] = "parameters"
    ranking: Literal["joint", "kind"] = "joint"
    round_to: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _number("Prune.keep", self.keep, 0, 1, open_low=True)
        if isinstance(self.kinds, str) or not all(isinstance(kind, str) for kind in self.kinds):
            raise PlanError(f"Prune.kinds is {self.kinds!r}", advice="give a tuple of kinds")
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if "width" in self.kinds and len(set(self.kinds)) > 1:
            raise PlanError(
                f"Prune.kinds is {self.kinds!r}: units of the width hold parameters of all others",
                advice="search one after the other and compose: second.after(first)",
            )
        for field in ("block", "samples", "age", "init_batches", "round_to"):
            _count(f"Prune.{field}", getattr(self, field), 1)
        for field in ("steps", "seed", "history"):
            _count(f"Prune.{field}", getattr(self, field), 0)
        for field in ("lr", "trust_cap", "init_scale", "outlier"):
            _number(f"Prune.{field}", getattr(self, field), 0, math.inf, open_low=True)
        _number("Prune.clip", self.clip, 1, math.inf)
        _number("Prune.widen", self.widen, 1, 1e6)
        _number("Prune.alpha", self.alpha, 0.5, 1)
        _number("Prune.ess", self.ess, 0, 1)
        _number("Prune.epsilon", self.epsilon, 0, 0.4)
        if not isinstance(self.standardise, bool):
            raise PlanError(f"Prune.standardise is {self.standardise!r}", advice="True or False")
        for field, words in _WORDS.items():
            choice(f"Prune.{field}", getattr(self, field), words, ())

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict of plain values."""
        return {**asdict(self), "kinds": list(self.kinds)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prune:
        """Build from `to_dict`'s result; fields left out take their defaults.

        Raises:
            PlanError: `data` is no mapping, or has an unknown name or an impossible value.
        """
        values = mapping(cls, data)
        if "kinds" in values:
            values["kinds"] = tuple(values["kinds"])
        return cls(**values)


_WORDS: dict[str, tuple[str, ...]] = {
    "order": ("importance", "index"),
    "decay": ("cosine", "none"),
    "scope": ("full", "layer", "none"),
    "metric": ("euclidean", "preconditioned"),
    "trust": ("step", "strict"),
    "baseline": ("loo", "ema"),
    "resident": ("all", "one"),
    "init": ("wanda", "magnitude", "taylor", "random", "uniform"),
    "cost": ("parameters", "units"),
    "ranking": ("joint", "kind"),
}
