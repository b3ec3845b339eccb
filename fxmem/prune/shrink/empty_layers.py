"""Layers that do not run with no unit keep one that says nothing.

GPT-2's split and OPT's views fail on axes of no elements. There the first unit stays and the
weights that take its value are zero: the same output, bit for bit of what no unit gives. So it is
for a width of no channel, which no norm can average over.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxmem.prune.shrink.size_attributes import nonzero
from fxmem.prune.units.masks import Masks, axis_keeps
from fxmem.prune.units.units import Coupling, UnitGroup, positions


def padded(
    model: nn.Module, coupling: Coupling, masks: Masks
) -> tuple[Masks, tuple[UnitGroup, ...]]:
    """Masks with one unit in every group that needs one, and those groups."""
    kinds = nonzero(model) | {"width"}
    bare = tuple(g for g in coupling.groups if g.kind in kinds and not masks.kept(g.name))
    if not bare:
        return masks, ()
    names = {g.name for g in bare}
    kept = {name: (0,) if name in names else units for name, _, units in masks.entries}
    return Masks.from_kept(coupling, kept), bare


def silence(
    parameters: Mapping[str, Tensor], coupling: Coupling, masks: Masks, bare: tuple[UnitGroup, ...]
) -> None:
    """Zero, in place, what the consumers of the groups `bare` hold of their one unit.

    Args:
        parameters: cut parameters by name, with storage of their own.
        masks: as `padded` gives them.
    """
    shapes, keeps = dict(coupling.shapes), axis_keeps(coupling, masks)
    for g in bare:
        for name, axis, path in g.consumer:
            unit = ~positions(shapes[name][axis], path, g.size, ())
            index = unit[keeps[name, axis]] if (name, axis) in keeps else unit
            where = index.nonzero()[:, 0].to(parameters[name].device)
            with torch.no_grad():
                parameters[name].index_fill_(axis, where, 0)
