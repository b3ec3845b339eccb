"""Options of the mask search, as plain values that are checked when they are built."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from fxmem.checks import check_names, choice, mapping, option_class
from fxmem.errors import PlanError
from fxmem.prune.units.settings import GateSettings, Init, ScoreSettings, Settings

_T = TypeVar("_T")
ESTIMATORS: dict[str, type[Settings]] = {"gates": GateSettings, "score": ScoreSettings}
GONE = ("trust", "baseline")
"""Options of version 0.1.0 that lost against their defaults and are no more."""


def _own(cls: type[Settings]) -> tuple[str, ...]:
    """The fields that `Prune` itself does not have."""
    shared = ("keep", "kinds", "steps", "init", "round_to", "seed", "uniform")
    return tuple(f.name for f in fields(cls) if f.name not in shared)


def _moved(cls: type[_T]) -> type[_T]:
    """Take options that stood in the first version beside the others, with a warning."""
    init = cls.__init__

    @functools.wraps(init)
    def taken(self: _T, *args: Any, **kwargs: Any) -> None:
        old = {k: kwargs.pop(k) for k in (*_own(ScoreSettings), *GONE) if k in kwargs}
        if old:
            warnings.warn(
                f"Prune({', '.join(f'{k}=...' for k in old)}) is deprecated: write "
                'Prune(estimator="score", advanced={...}) with these names',
                DeprecationWarning, stacklevel=2,
            )  # fmt: skip
            kwargs = {"estimator": "score", "steps": 200, "init": "wanda", **kwargs}
            old = {k: v for k, v in old.items() if k not in GONE}
            kwargs["advanced"] = {**old, **dict(kwargs.get("advanced", ()))}
        init(self, *args, **kwargs)

    cls.__init__ = taken  # type: ignore[assignment]
    return cls


@_moved
@option_class
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
        estimator: ``"gates"`` moves a score per unit by the derivative of its gate, one forward
            and backward of a sub-model per step; ``"score"`` samples masks and needs forwards
            only, many more, and its gradient is unbiased.
        steps: updates; one batch each. ``"score"`` wants 200 or more.
        init: importance that the search starts from; ``"taylor"`` needs a backward per batch.
        round_to: kept channels per layer are a multiple of this.
        seed: of every mask that is drawn; equal seeds give equal masks on any number of ranks.
        advanced: further options of the estimator by name: those of
            `fxmem.prune.units.settings.GateSettings` or ``ScoreSettings``.
        uniform: all layers keep as many units of a kind, so that transformers can load the result.

    Raises:
        PlanError: for an unknown option or an impossible value.
    """

    keep: float = 0.5
    kinds: tuple[str, ...] = ()
    estimator: Literal["gates", "score"] = "gates"
    steps: int = 40
    init: Init = "taylor"
    round_to: int = 1
    seed: int = 0
    advanced: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    uniform: bool = False

    def __post_init__(self) -> None:
        choice("Prune.estimator", self.estimator, tuple(ESTIMATORS), ())
        if not isinstance(self.advanced, (Mapping, tuple)):
            raise PlanError(
                f"Prune.advanced is {self.advanced!r}", advice="give a dict of named options"
            )
        given = dict(self.advanced)
        check_names("Prune.advanced", given, _own(ESTIMATORS[self.estimator]))
        # of plain values, so that options compare and hash by value
        object.__setattr__(self, "advanced", tuple(sorted(given.items())))
        if not isinstance(self.kinds, str):
            object.__setattr__(self, "kinds", tuple(self.kinds))
        self.settings()

    def settings(self) -> Settings:
        """These options with those of their estimator, flat and checked."""
        return ESTIMATORS[self.estimator](
            keep=self.keep, kinds=self.kinds, steps=self.steps, init=self.init,
            round_to=self.round_to, seed=self.seed, uniform=self.uniform, **dict(self.advanced),
        )  # fmt: skip

    @classmethod
    def _upgrade(cls, values: Sequence[Any]) -> dict[str, Any]:
        """The fields of a pickle that holds them in order; one of 0.1.0 has its own thirty."""
        if len(values) != len(_FIRST):
            return dict(zip((field.name for field in fields(cls)), values, strict=False))
        old = dict(zip(_FIRST, values, strict=True))
        plain = ScoreSettings()
        differ = {k: old[k] for k in _own(ScoreSettings) if old[k] != getattr(plain, k)}
        again = Prune(
            keep=old["keep"], kinds=old["kinds"], estimator="score", steps=old["steps"],
            init=old["init"], round_to=old["round_to"], seed=old["seed"], advanced=differ,
        )  # fmt: skip
        return {field.name: getattr(again, field.name) for field in fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict of plain values."""
        return {**asdict(self), "kinds": list(self.kinds), "advanced": dict(self.advanced)}

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


_FIRST = (
    "keep", "kinds", "block", "order", "steps", "samples", "lr", "standardise", "decay", "scope",
    "clip", "alpha", "metric", "trust", "trust_cap", "baseline", "outlier", "history", "widen",
    "ess", "age", "resident", "init", "init_batches", "init_scale", "epsilon", "cost", "ranking",
    "round_to", "seed",
)  # fmt: skip
