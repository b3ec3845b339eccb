"""Sizes that are values of a tensor, and sizes that became numbers: one check per private name."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxmem._compat import graph as _compat
from fxmem._compat.data_sizes import by_data, evaluating
from fxmem._compat.inductor import Symbolic
from fxmem._compat.memory import StorageWatch


def test_sizes_by_data_are_known_and_leave_nothing_behind() -> None:
    mode = _compat.FakeTensorMode(shape_env=(env := ShapeEnv()))
    x = mode.from_tensor(torch.ones(3))
    with evaluating(mode):
        rows = x.nonzero()
    assert by_data(rows)
    assert by_data(rows.shape[0])
    assert not by_data(x)
    assert not by_data(3)
    assert not env.pending_fresh_unbacked_symbols
    with evaluating(None):
        assert torch.ones(2).nonzero().shape == (2, 1)


def test_a_size_that_became_a_number_is_a_guard() -> None:
    sizes = Symbolic.of({"T": 9})
    symbol = sizes.ints["T"].node.expr
    assert int(sizes.ints["T"]) == 9
    assert [g.free_symbols for g in _compat.size_guards(sizes.mode)] == [{symbol}]


def test_storage_watch_takes_every_element_of_a_mask_for_set() -> None:
    with _compat.FakeTensorMode(), StorageWatch() as watch:
        x, mask = torch.empty(2, 3, 4), torch.empty(2, 3, dtype=torch.bool)
        found = x[mask]
        assert x[:, mask[0]].shape == (2, 3, 4)
        assert mask.nonzero().shape == (6, 2)
    assert found.shape == (6, 4)
    assert watch.owner(found)[1] == 6 * 4 * 4
