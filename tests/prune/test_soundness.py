"""No coupling is wrong without an error, and no unit is left out without a reason."""

from __future__ import annotations

import re

import torch
from couplings import LAYERS, WIDTH, Stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_networks import check

import fxmem
from fxmem.prune.coupling.calls import Inputs


def some_input(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 5, WIDTH, dtype=torch.float64)


def test_every_unit_is_there_or_named() -> None:
    torch.manual_seed(0)
    names = list(LAYERS)
    model = Stack(*names)
    units = fxmem.coupling(model, some_input())
    for number, name in enumerate(names):
        expected = LAYERS[name][1]
        inside = f"layers.{number}."
        sizes = [g.size for g in units.groups if all(n.startswith(inside) for n, _, _ in g.members)]
        if isinstance(expected, list):
            assert sizes == expected, name
        else:
            why = [w for n, axis, w in units.blocked if n == f"{inside}up.weight" and axis == 0]
            assert not sizes and re.search(expected, why[0]), (name, sizes, why)
    covered = {(n, i) for g in units.groups for n, i, _ in g.members}
    covered |= {(n, i) for n, i, _ in units.blocked}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert covered >= {(n, i) for n, s in shapes.items() for i, size in enumerate(s) if size > 1}
    masks = fxmem.Masks.from_kept(units, {g.name: tuple(range(1, g.size)) for g in units.groups})
    check(model, Inputs((some_input(3),), {}), units, masks)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_masks_of_any_layers(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    model = Stack(*data.draw(st.permutations(list(LAYERS)))[:5])
    units = fxmem.coupling(model, some_input())
    kept = {
        g.name: tuple(sorted(data.draw(st.sets(st.integers(0, g.size - 1), min_size=g.least))))
        for g in units.groups
    }
    check(model, Inputs((some_input(3),), {}), units, fxmem.Masks.from_kept(units, kept))
