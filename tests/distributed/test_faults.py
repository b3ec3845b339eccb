"""A step that fails, a plan that differs, a rank that ends: what the ranks do next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from faulty import ENGINES, after_faults, killed, moved, other_plans
from ranks import on_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("engine", ENGINES)
def test_the_step_after_any_failed_one_is_exact(engine: str) -> None:
    """On all ranks, in any region, forward or backward, or in a loss after the call."""
    for found in on_ranks(after_faults, engine, 1):
        assert len(found) > 0
        assert max(error for _, error in found) < 1e-10, found


def test_ranks_stay_equal_where_a_failed_backward_has_moved_weights() -> None:
    (first, one), (second, two) = on_ranks(moved)
    assert first == second and set(first) == {"raised"}
    assert all(map(torch.equal, one, two))
    assert all(t.isfinite().all() for t in one)


def test_other_plans_are_an_error_on_every_rank_before_anything_is_gathered() -> None:
    for found in on_ranks(other_plans):
        for message, sent in found:
            assert message.startswith("DivergedError"), message
            assert sent == {"all-reduces": 1}
        assert ["plans" in message for message, _ in found] == [True, True, True, False, True]
        assert "parameters that learn" in found[3][0]


def test_a_rank_that_ends_is_an_error_on_the_others(tmp_path: Path) -> None:
    mp.spawn(killed, (str(tmp_path),), nprocs=2)
    assert "gloo/transport/" in (tmp_path / "error").read_text()
