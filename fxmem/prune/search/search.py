"""``fxmem.search`` and ``fxmem.score``: the mask search on real models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat.overrides import version
from fxmem.errors import ModifiedParameterError, PlanError
from fxmem.frontend.inputs import without_cache
from fxmem.prune.search import session
from fxmem.prune.search.ranks import Ranks
from fxmem.prune.search.scores import importance as measure
from fxmem.prune.search.snapshot import Loss
from fxmem.prune.search.space import Space, standardise
from fxmem.prune.shrink.gated_submodel import GatedSubmodel, on
from fxmem.prune.shrink.materialize import coupling
from fxmem.prune.shrink.submodels import Instances
from fxmem.prune.units.kinds import chosen, say_what_stays
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
    device: torch.device | str | None = None,
    prepare: Callable[[nn.Module], Any] | None = None,
) -> Masks:
    """Find which units to keep; only sub-models run, each for many steps.

    A formulation consistent with the abstract of "Computation and Memory-Efficient Model
    Compression with Gradient Reweighting" (NeurIPS 2025): gradients come from outdated sub-models.
    See `fxmem.prune.search.gate_loop`, and `fxmem.prune.search.estimator` for
    ``estimator="score"``.

    Args:
        model: the dense model; unchanged.
        batches: keyword arguments of the model, with labels; one per step, in turn.
        options: defaults to ``Prune()``: half of the prunable parameters stay.
        callback: called after every step.
        checkpoint: file that holds the state after every step; resumed from where it exists.
        progress: show a progress bar.
        group: a `torch.distributed` group whose ranks share the batches of a step (``"gates"``) or
            the masks (``"score"``).
        coupled: ``fxmem.coupling(model)``, where it is at hand: tracing takes a while.
        importance: values from `fxmem.score` to start from instead of measuring ``options.init``.
        device: where sub-models run; the dense model stays where it is.
        prepare: called with every sub-model that is built, ``estimator="gates"`` only; what it
            returns runs. ``prepare=fxmem.transform`` streams them.

    Raises:
        BudgetError: the budget cannot be met, or there is nothing to prune or to measure on.
        PlanError: a kind of unit that the model does not have, or two that overlap.
        DivergedError: ranks disagree.
    """
    options = options or Prune()
    coupled = coupled or coupling(model)
    groups = chosen(coupled, options.kinds)
    if not options.kinds:
        say_what_stays(coupled)
    if options.estimator == "gates":
        factory = _gated(model, coupled, [g.name for g in groups], device, prepare)
    elif prepare is None:
        factory = _factory(model, coupled, device)
    else:
        raise PlanError("prepare is for sub-models with gates", advice='take estimator="gates"')
    found = session.run(
        model,
        groups,
        factory,
        batches,
        options.settings(),
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
        options: `keep`, `kinds`, `round_to`, `seed`, and of the advanced ones `cost` and
            `ranking` are used. Units are single.
        coupled: ``fxmem.coupling(model)``, where it is at hand.

    Raises:
        BudgetError: there is nothing to prune, or too little stays for the experts of a token.
        PlanError: an unknown method or kind, or kinds that overlap.
    """
    how = (options or Prune()).settings()
    coupled = coupled or coupling(model)
    groups = chosen(coupled, how.kinds)
    values = measure(model, batches, groups, method, how.seed)
    space = Space.build(groups, how, values, block=1)
    kept = space.final(space.pool(standardise(space, values, method)), how)
    return values, Masks.from_bools(coupled, space.bools(kept))


def _gated(
    model: nn.Module, coupled: Coupling, names: Sequence[str],
    device: torch.device | str | None, prepare: Callable[[nn.Module], Any] | None,
) -> session.Instantiate:  # fmt: skip
    before = [(p, version(p)) for p in model.parameters()]

    def instantiate(bools: Mapping[str, Tensor]) -> GatedSubmodel:
        if any(version(p) != number for p, number in before):
            raise ModifiedParameterError(
                "the model has changed during the search",
                advice="search first, and train the smaller model",
            )
        masks = Masks.from_bools(coupled, bools)
        return GatedSubmodel(model, coupled, masks, names, device, prepare)

    return instantiate


def _factory(
    model: nn.Module, coupled: Coupling, device: torch.device | str | None
) -> session.Instantiate:
    """Sub-models that share one module: a new one costs its slices, no module is copied."""
    instances = Instances(model, coupled, device, compile=False)
    instances.skeleton.eval()

    def instantiate(bools: Mapping[str, Tensor]) -> Loss:
        small = instances(Masks.from_bools(coupled, bools))

        def loss(batch: Mapping[str, Any], *inside: Mapping[str, Tensor]) -> float:
            masks = [Masks.from_bools(coupled, m) for m in inside]
            with torch.no_grad():
                given = on(instances.device, batch)
                return float(small(without_cache(model, given), *masks).loss)

        return loss

    return instantiate
