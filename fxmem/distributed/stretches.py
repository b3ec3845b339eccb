"""Over which regions of a call a group of parameters is whole.

FSDP2 gathers a group when the first of its modules is called, and closes it when all of them have
been. A module that is called again, in a model that goes through its layers several times, is
gathered again: what ranks send must not depend on which of them streams, and no group is whole for
longer than under FSDP2.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

G = TypeVar("G", bound=Hashable)
ModuleCall = tuple[str, int]
"""Path of a module, and how often it has been called before."""


@dataclass(slots=True)
class Stretch:
    """Regions from ``start`` to ``end``; ``order`` in which stretches begin.

    Attributes:
        entered: a gradient leaves the first call of a module there. FSDP2 closes and reduces others
            at the end of a backward.
        again: at its start the group is whole from the stretch before it.
        goes_on: at its end it is whole for the next one.
    """

    start: int
    end: int
    order: int
    entered: bool = True
    again: bool = False
    goes_on: bool = False


def stretches(
    uses: Mapping[G, Sequence[int]],
    calls: Sequence[Mapping[ModuleCall, bool]],
    modules: Mapping[str, tuple[G, Hashable]],
) -> list[tuple[G, Stretch]]:
    """Of all groups, in the order in which they are gathered.

    Args:
        uses: regions that read a group's parameters, in order.
        calls: what each region is a part of, in order, and whether what is given wants a gradient.
        modules: by path, the group and the module itself, which may have several paths.
    """
    found = []
    of_calls = _of_calls(calls, modules)
    for place, (group, regions) in enumerate(uses.items()):
        own = [s for s in of_calls.get(group, []) if any(s.start <= r <= s.end for r in regions)]
        covered = all(any(s.start <= r <= s.end for s in own) for r in regions)
        if len(own) < 2 or not covered:
            order, entered = (own[0].order, own[0].entered) if own else (place, True)
            own = [Stretch(regions[0], regions[-1], order, entered)]
        for before, after in zip(own, own[1:], strict=False):
            after.again = before.goes_on = after.start <= before.end
        found += [(group, s) for s in own]
    return sorted(found, key=lambda x: (x[1].start, x[1].order))


def _of_calls(
    calls: Sequence[Mapping[ModuleCall, bool]], modules: Mapping[str, tuple[G, Hashable]]
) -> dict[G, list[Stretch]]:
    last = {call: i for i, region in enumerate(calls) for call in region}
    first: dict[ModuleCall, int] = {}
    for i, region in enumerate(calls):
        for call in region:
            first.setdefault(call, i)
    members: dict[G, set[Hashable]] = {}
    for group, module in modules.values():
        members.setdefault(group, set()).add(module)
    missing: dict[G, set[Hashable]] = {}
    found: dict[G, list[Stretch]] = {}
    for order, (call, start) in enumerate(first.items()):
        if call[0] not in modules:
            continue
        group, module = modules[call[0]]
        if not missing.get(group):
            missing[group] = set(members[group])
            entered = any(region.get(call) for region in calls)
            found.setdefault(group, []).append(Stretch(start, last[call], order, entered))
        missing[group].discard(module)
        found[group][-1].end = max(found[group][-1].end, last[call])
    return found
