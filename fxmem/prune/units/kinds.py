"""Kinds of units that a search can choose among: groups' own, and whole blocks and layers.

A block is a group that goes with all its units: attention with its last group of heads, an MLP
with its last channel. A layer is all blocks of one decoder layer. A search has one unit for each.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from fxmem.errors import FxmemWarning, PlanError
from fxmem.prune.units.masks import BLOCKS
from fxmem.prune.units.units import Coupling

WHOLE = {**{block: (kind,) for kind, block in BLOCKS.items()}, "layers": tuple(BLOCKS)}
"""Kinds of blocks -> the kinds of groups that go whole with one."""


def chosen(coupled: Coupling, kinds: Sequence[str]) -> list[Any]:
    """Groups of the wanted kinds; without any, the heads and channels of every layer, and those of
    convolutions.

    Raises:
        PlanError: a kind the model does not have, or two that would remove the same weights.
    """
    inside = [g for g in coupled.groups if g.layer >= 0]
    if not kinds:
        units = [g for g in coupled.groups if g.kind not in ("experts", "width")]
        return [g for g in units if g.layer >= 0 or g.kind == "channels"] or units
    found = dict.fromkeys(g.kind for g in coupled.groups)
    blocks = [b for b, parts in WHOLE.items() if any(g.kind in parts for g in inside)]
    for kind in kinds:
        if kind not in (*found, *blocks):
            raise PlanError(
                f"the model has no units of kind {kind!r}",
                advice=f"kinds it has: {', '.join((*found, *blocks))}",
            )
    covers = {kind: _covered(coupled, kind) for kind in dict.fromkeys(kinds)}
    for i, first in enumerate(covers):
        for second in list(covers)[i + 1 :]:
            _separate(first, covers[first], second, covers[second])
    return [g for g in coupled.groups if any(g in groups for groups in covers.values())]


def say_what_stays(coupled: Coupling) -> None:
    """Warn of matrices in layers that no search can make smaller."""
    found = {role: why for role, why in coupled.left_out.items() if "*" in role}
    if found:
        role, why = next(iter(found.items()))
        more = f", and {len(found) - 1} other kinds of matrices" if len(found) > 1 else ""
        warnings.warn(
            f"{role}{more} stay whole: no unit of them can be removed exactly ({why}); "
            "print(fxmem.coupling(model)) lists all reasons",
            FxmemWarning, stacklevel=3,
        )  # fmt: skip


def _covered(coupled: Coupling, kind: str) -> list[Any]:
    if kind in WHOLE:
        return [g for g in coupled.groups if g.kind in WHOLE[kind] and g.layer >= 0]
    return [g for g in coupled.groups if g.kind == kind]


def _separate(first: str, one: list[Any], second: str, two: list[Any]) -> None:
    """Refuse kinds whose costs overlap: the same group, or experts and what is inside them."""
    for a in one:
        for b in two:
            experts = "experts" in (a.kind, b.kind)
            shared = {n for n, _, _ in a.members} & {n for n, _, _ in b.members}
            if a == b or (experts and shared):
                raise PlanError(
                    f"kinds {first!r} and {second!r} both remove weights of {a.name}",
                    advice="search them one after the other, the second on the materialised model",
                )


def bundle(name: str, kind: str, kinds: Sequence[str]) -> tuple[str, str] | None:
    """The block that a group goes whole with: (kind of block, path of its layer), or None.

    Args:
        name: of the group, a module path.
        kind: of the group.
        kinds: what the search was asked for.
    """
    for block in kinds:
        if kind in WHOLE.get(block, ()):
            layer = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
            return block, layer[0] if layer else name
    return None
