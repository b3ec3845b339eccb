"""Masks inside a sub-model that is built already: gates on what the consumers of a unit read.

A closed gate multiplies a unit's value by zero where its consumer reads it, which equals the
sub-model without the unit; see `fxmem.prune.shrink.masked`. Nothing is sliced or copied, except for
batched matrices (experts), whose contracted axis is masked instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from fxmem.errors import MaskError
from fxmem.prune.shrink.masked import multiply, takes_mask
from fxmem.prune.units.masks import Masks, axis_keeps, consumer_keeps
from fxmem.prune.units.units import Coupling

UNGATED = frozenset({"experts", "width"})
"""Kinds of units that a zero at what reads them does not remove: their masks are not nested."""

Gates = dict[tuple[str, int], Tensor]


def gates(coupling: Coupling, built: Masks, inside: Masks) -> Gates:
    """``(parameter, axis)`` of the consumers -> bool over that axis of the sub-model.

    Args:
        coupling: of the dense model.
        built: masks the sub-model was cut with.
        inside: masks of the dense model that keep none but units of `built`.

    Raises:
        MaskError: units that no gate can remove differ.
    """
    for group in coupling.groups:
        if group.kind in UNGATED and inside.kept(group.name) != built.kept(group.name):
            raise MaskError(
                f"a gate cannot remove units of {group.name}",
                advice=f"masks inside a sub-model keep its {group.kind}",
            )
    cut = axis_keeps(coupling, built)
    wanted = consumer_keeps(coupling, inside)
    return {key: keep[cut[key]] if key in cut else keep for key, keep in wanted.items()}


@contextlib.contextmanager
def gated(
    skeleton: nn.Module, values: Mapping[str, Tensor], closed: Gates, unowned: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Inside the context `skeleton` runs with closed gates; gives its parameters to run with.

    ``unowned``: weights that a gate must stand on themselves, see `masked.unowned`.
    """
    new = dict(values)
    with contextlib.ExitStack() as stack:
        for (name, axis), keep in closed.items():
            if bool(keep.all()):
                continue
            path, _, leaf = name.rpartition(".")
            owner = skeleton.get_submodule(path)
            if takes_mask(owner, leaf, name, unowned):
                stack.callback(owner.register_forward_pre_hook(multiply(keep)).remove)
            else:
                shape = [1] * values[name].dim()
                shape[axis] = -1
                new[name] = new[name] * keep.to(new[name]).view(shape)
        yield new
