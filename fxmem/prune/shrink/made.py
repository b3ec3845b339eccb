"""How a smaller model was made: coupling of the dense one, and masks. Copies know it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fxmem.prune.units.masks import Masks, axis_keeps, buffer_keeps
from fxmem.prune.units.units import Coupling, Member, cost_of

_NAME = "_fxmem_made"


@dataclass(frozen=True)
class _Made:
    plan: Coupling
    masks: Masks

    def __deepcopy__(self, memo: Any) -> _Made:
        return self


def origin(small: nn.Module) -> tuple[Coupling, Masks] | None:
    """Dense coupling and masks that ``small`` was made with, None for a model that was not."""
    made = vars(small).get(_NAME)
    return None if made is None else (made.plan, made.masks)


def record(small: nn.Module, plan: Coupling, masks: Masks) -> None:
    """Let `origin` know how ``small`` was made."""
    vars(small)[_NAME] = _Made(plan, masks)


def reduced(plan: Coupling, masks: Masks) -> Coupling:
    """The coupling of the model that ``masks`` leave: same groups, fewer units."""
    keeps = axis_keeps(plan, masks)
    of_buffers = buffer_keeps(plan, masks)
    new_shapes, new_buffers = _shrunk(plan.shapes, keeps), _shrunk(plan.buffers, of_buffers)
    keeps |= of_buffers

    def moved(member: Member) -> Member:
        name, axis, path = member
        keep = keeps.get((name, axis))
        if keep is None:
            return member
        steps = tuple(
            (kind, int(keep[:a].sum()), int(keep[a : a + b].sum())) if kind == "segment"
            else (kind, a, b)
            for kind, a, b in path
        )  # fmt: skip
        return name, axis, steps

    groups = []
    for g in plan.groups:
        members = tuple(moved(m) for m in g.members)
        size = len(masks.kept(g.name))
        cost = cost_of(members, new_shapes, size) if size else 0
        groups.append(
            replace(
                g, size=size, cost=cost, members=members,
                consumer=tuple(moved(m) for m in g.consumer),
                router=tuple(moved(m) for m in g.router),
                buffers=tuple(moved(m) for m in g.buffers),
            )
        )  # fmt: skip
    return replace(
        plan, groups=tuple(groups), shapes=tuple(new_shapes.items()),
        buffers=tuple(new_buffers.items()),
    )  # fmt: skip


def _shrunk(
    known: tuple[tuple[str, tuple[int, ...]], ...], keeps: Mapping[tuple[str, int], Tensor]
) -> dict[str, tuple[int, ...]]:
    shapes = {n: list(s) for n, s in known}
    for (name, axis), keep in keeps.items():
        shapes[name][axis] = int(keep.sum())
    return {n: tuple(s) for n, s in shapes.items()}


__all__ = ["origin", "record", "reduced"]
