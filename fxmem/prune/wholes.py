"""Whole blocks and layers as units of a search.

A block that is removed is a group of which no unit stays: its branch adds nothing to the residual
stream, except an output bias where there is one. So wholes need no masks of their own; a search
over them keeps or removes all units of some groups at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from fxmem.errors import PlanError

WHOLES: dict[str, tuple[str, ...]] = {
    "attention_blocks": ("kv_groups",),
    "mlp_blocks": ("mlp_channels",),
    "layers": ("kv_groups", "mlp_channels"),
}
"""Kind of whole -> kinds of the groups that it removes, those of one layer together."""


class Part(Protocol):
    """What is asked of a group."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int: ...


def chosen_kinds(kinds: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Kinds of the groups to search -> the whole that they are searched as, "" for single units.

    Args:
        kinds: as in `Prune.kinds`, not empty.
        known: kinds of groups that the model has.

    Raises:
        PlanError: a kind that the model does not have, or two that remove the same units.
    """
    found: dict[str, str] = {}
    by: dict[str, str] = {}
    possible = [k for k, parts in WHOLES.items() if set(parts) <= set(known)]
    for kind in kinds:
        if kind not in known and kind not in possible:
            names = ", ".join([*known, *possible])
            why = "fxmem.coupling(model).blocked has the reasons of axes that cannot be pruned"
            raise PlanError(f"no unit of kind {kind!r}", advice=f"kinds: {names}; {why}")
        for part in WHOLES.get(kind, (kind,)):
            if part in by:
                raise PlanError(
                    f"kinds {by[part]!r} and {kind!r} both remove {part}",
                    advice="search them one after the other, and join the masks with `after`",
                )
            by[part] = kind
            found[part] = kind if kind in WHOLES else ""
    return found


def parts_of_wholes(groups: Sequence[Part], kinds: Collection[str]) -> dict[str, str]:
    """Names of the groups that are searched as a whole -> the kind of the whole."""
    if not set(kinds) & set(WHOLES):
        return {}
    by = chosen_kinds(kinds, {g.kind for g in groups})
    return {g.name: by[g.kind] for g in groups if by.get(g.kind)}
