"""One search on a model: importance, start, loop, checkpoint, progress, final mask.

What the model is stays behind two arguments: its groups, and how a sub-model is instantiated from
one bool tensor per group.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxmem import files
from fxmem.errors import FileError, FxmemError
from fxmem.prune.search.gate_loop import Derivatives, GateLoop
from fxmem.prune.search.loop import Loop
from fxmem.prune.search.scores import importance
from fxmem.prune.search.snapshot import Alone, Exchange, Loss
from fxmem.prune.search.space import Space, start
from fxmem.prune.search.spent import Counts
from fxmem.prune.shrink.gates import UNGATED
from fxmem.prune.units.settings import GateSettings, ScoreSettings, Settings
from fxmem.prune.units.units import Group

SAMPLED = 1024
"""Values of a parameter that its digest is made of."""
ANEW = "delete the file to search anew, or name another one"
Instantiate = Callable[[dict[str, Tensor]], Any]
"""A sub-model from a mask per group: ``loss(batch)``, or ``loss(batch, masks inside those)``; for a
search by gates the loss and its derivatives, (size,) per group."""


@dataclass(frozen=True)
class Step:
    """What a callback sees after every step.

    Attributes:
        step: steps done, 1 to `steps`.
        loss: mean loss of the sub-models in this step.
        probabilities: keep probability of every search unit, or its score in (0, 1), float64 (n,).
        counts: what the search spent so far.
        space: the search units.
        options: the search's options.
    """

    step: int
    loss: float
    probabilities: Tensor
    counts: Counts
    space: Space
    options: Settings

    def bools(self) -> dict[str, Tensor]:
        """The mask that the search would end with now; bool (size,) per group."""
        return self.space.bools(self.space.final(self.probabilities, self.options))


@dataclass(frozen=True)
class Found:
    """Result of a search: a mask per group, and how it was reached."""

    bools: dict[str, Tensor]
    probabilities: Tensor
    counts: Counts
    space: Space


def as_batches(batches: Iterable[Any], steps: int) -> Sequence[Any]:
    """A sequence that can be read again; of an endless iterable as much as the steps need."""
    if isinstance(batches, Sequence):
        return batches
    return list(itertools.islice(batches, max(steps, 1)))


def run(
    model: nn.Module,
    groups: Sequence[Group],
    instantiate: Instantiate,
    batches: Iterable[Mapping[str, Any]],
    options: Settings,
    *,
    callback: Callable[[Step], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    exchange: Exchange | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> Found:
    """Search the masks of `groups`; see `fxmem.search` for the arguments."""
    data = as_batches(batches, options.steps)
    file = Path(checkpoint) if checkpoint is not None else None
    writer = (exchange or Alone()).rank == 0
    if file is not None and writer:
        files.check_target(file)
    of = _digest(model, groups) if file is not None else ""
    saved = _saved(file, of) if file is not None and file.exists() else None
    if saved is not None:
        values = saved["importance"]
    elif values is None and options.init != "uniform":
        some = data[: options.init_batches]
        values = importance(model, some, groups, options.init, options.seed)
    if values is None:
        values = {group.name: torch.ones(group.size) for group in groups}
    space = Space.build(groups, options, values)
    loop = _loop(space, values, options, instantiate, data, exchange)
    if saved is not None:
        _resume(loop, saved["loop"], file)
    for _ in _bar(range(loop.done, options.steps), progress and writer):
        loop.step()
        if file is not None and writer:
            with files.replacing(file) as part:
                torch.save({"of": of, "importance": dict(values), "loop": loop.state()}, part)
        if callback is not None:
            seen = (loop.done, loop.counts.losses[-1], loop.probabilities, loop.counts)
            callback(Step(*seen, space, options))
    mask = space.final(loop.s, options)
    return Found(space.bools(mask), loop.probabilities, loop.counts, space)


def _loop(
    space: Space, values: Mapping[str, Tensor], options: Settings, instantiate: Instantiate,
    data: Sequence[Any], exchange: Exchange | None,
) -> Loop | GateLoop:  # fmt: skip
    def can(closed: frozenset[str]) -> Tensor:
        return torch.tensor([group.kind not in closed for group in space.groups])[space.owner]

    if isinstance(options, GateSettings):
        return GateLoop(
            space, values, options,
            lambda mask: _by_units(instantiate(space.bools(mask)), space), data, exchange,
            can(frozenset({"experts"})),
        )  # fmt: skip
    assert isinstance(options, ScoreSettings)
    return Loop(
        start(space, values, options), space.cost, space.layer, options.keep * space.budget_base,
        options, lambda mask: _over_units(instantiate(space.bools(mask)), space), data, exchange,
        can(UNGATED),
    )  # fmt: skip


def _digest(model: nn.Module, groups: Sequence[Group]) -> str:
    """Of the groups, and of names, shapes and some values of all parameters."""
    found = hashlib.sha256(repr([(g.name, g.size, g.cost) for g in groups]).encode())
    for name, p in model.named_parameters():
        some = p.detach().reshape(-1)[:: max(1, p.numel() // SAMPLED)].double().cpu()
        found.update(repr((name, tuple(p.shape), p.dtype)).encode() + some.numpy().tobytes())
    return found.hexdigest()


def _saved(file: Path, of: str) -> dict[str, Any]:
    """A checkpoint of a search on this model and these groups.

    Raises:
        FileError: it is damaged, or something else.
    """
    try:
        saved = torch.load(file, weights_only=True)
    except Exception as error:  # a damaged archive or pickle may raise anything
        raise FileError(f"{file} is no checkpoint of a search: {error}", advice=ANEW) from error
    if not isinstance(saved, dict) or not {"of", "importance", "loop"} <= set(saved):
        raise FileError(f"{file} is no checkpoint of a search", advice=ANEW)
    if saved["of"] != of:
        raise FileError(f"{file} is no checkpoint of a search on this model", advice=ANEW)
    return saved


def _resume(loop: Loop | GateLoop, state: dict[str, Any], file: Path | None) -> None:
    try:
        loop.load(state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, FxmemError):
            raise
        raise FileError(
            f"{file} is damaged: {type(error).__name__} {error}", advice=ANEW
        ) from error


def _over_units(loss: Loss, space: Space) -> Loss:
    """The loss of a sub-model, with masks inside it over search units."""

    def run(batch: Any, *inside: Tensor) -> float:
        return loss(batch, *map(space.bools, inside))

    return run


def _by_units(derivatives: Any, space: Space) -> Derivatives:
    """Loss and derivatives of a sub-model, over search units."""

    def run(batch: Any, mask: Tensor) -> tuple[float, Tensor]:
        loss, found = derivatives(batch, space.bools(mask))
        return loss, space.total(found)

    return run


def _bar(steps: range, shown: bool) -> Iterable[int]:
    if not shown:
        return steps
    from rich.progress import track

    return track(steps, description="searching masks")
