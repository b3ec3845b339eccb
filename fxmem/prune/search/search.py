"""``fxmem.search`` and ``fxmem.score``: the mask search on real models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.prune.search import session
from fxmem.prune.search.ranks import Ranks
from fxmem.prune.search.scores import importance as measure
from fxmem.prune.search.snapshot import Loss
from fxmem.prune.search.space import Space, standardise
from fxmem.prune.shrink.materialize import coupling
from fxmem.prune.shrink.submodels import Instances
from fxmem.prune.units.kinds import chosen
from fxmem.prune.units.masks import Masks
from fxmem.prune.units.options import Prune
from fxmem.prune.units.units import Coupling


def search(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    options: Prune | None = None,
    *,
    callback: Callable[[session.Step], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    group: Any = None,
    coupled: Coupling | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Find which units to keep; only sub-models run, forward only.

    A formulation consistent with the abstract of "Computation and Memory-Efficient Model
    Compression with Gradient Reweighting" (NeurIPS 2025); see `fxmem.prune.search.estimator`.

    Args:
        model: the dense model; unchanged.
        batches: keyword arguments of the model, with labels; one per step, in turn.
        options: defaults to ``Prune()``: half of the prunable parameters stay.
        callback: called after every step.
        checkpoint: file that holds the state after every step; resumed from where it exists.
        progress: show a progress bar.
        group: a `torch.distributed` group whose ranks share the masks; they exchange losses only.
        coupled: ``fxmem.coupling(model)``, where it is at hand: tracing takes a while.
        importance: values from `fxmem.score` to start from instead of measuring ``options.init``.

    Raises:
        BudgetError: the budget cannot be met, or there is nothing to prune or to measure on.
        PlanError: a kind of unit that the model does not have, or two that overlap.
        DivergedError: ranks disagree.
    """
    options = options or Prune()
    coupled = coupled or coupling(model)
    found = session.run(
        model,
        chosen(coupled, options.kinds),
        _factory(model, coupled),
        batches,
        options,
        callback=callback,
        checkpoint=checkpoint,
        progress=progress,
        exchange=None if group is None else Ranks(group),
        values=importance,
    )
    return Masks.from_bools(coupled, found.bools)


def score(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    method: str,
    options: Prune | None = None,
    *,
    coupled: Coupling | None = None,
) -> tuple[dict[str, Tensor], Masks]:
    """A baseline's importance per unit, and the mask it gives at the budget of `options`.

    Args:
        model: the dense model; unchanged.
        batches: keyword arguments of the model, with labels.
        method: "magnitude", "wanda", "taylor" or "random"; see `fxmem.prune.search.scores`.
        options: `keep`, `kinds`, `cost`, `ranking`, `round_to` and `seed` are used. Units are
            single, `block` is not used.
        coupled: ``fxmem.coupling(model)``, where it is at hand.

    Raises:
        BudgetError: there is nothing to prune, or too little stays for the experts of a token.
        PlanError: an unknown method or kind, or kinds that overlap.
    """
    options = options or Prune()
    coupled = coupled or coupling(model)
    groups = chosen(coupled, options.kinds)
    values = measure(model, batches, groups, method, options.seed)
    space = Space.build(groups, options, values, block=1)
    kept = space.final(space.pool(standardise(space, values, method)), options)
    return values, Masks.from_bools(coupled, space.bools(kept))


def _factory(model: nn.Module, coupled: Coupling) -> session.Instantiate:
    """Sub-models that share one module: a new one costs its slices, no module is copied."""
    instances = Instances(model, coupled, compile=False)
    instances.skeleton.eval()

    def instantiate(bools: Mapping[str, Tensor]) -> Loss:
        small = instances(Masks.from_bools(coupled, bools))

        def loss(batch: Mapping[str, Any], *inside: Mapping[str, Tensor]) -> float:
            masks = [Masks.from_bools(coupled, m) for m in inside]
            with torch.no_grad():
                return float(small({"use_cache": False, **batch}, *masks).loss)

        return loss

    return instantiate
