"""Block schedules and stochastic rounding."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from fxmem.blocks.order import Schedule
from fxmem.blocks.rounding import key, stochastic_round
from fxmem.errors import PlanError


@pytest.mark.parametrize(
    ("order", "compat", "expected"),
    [
        ("ascending", False, "0001112223330"),
        ("descending", False, "3332221110003"),
        ("ascending", True, "0011122233300"),
    ],
)
def test_steps_per_visit(order: str, compat: bool, expected: str) -> None:
    schedule = Schedule(4, 3, order, compat=compat)
    assert "".join(str(schedule.block(step)) for step in range(13)) == expected


def test_random_visits_every_block_and_leaves_global_generators() -> None:
    before = random.getstate(), torch.get_rng_state()
    schedule = Schedule(5, 2, seed=3)
    blocks = [schedule.block(step) for step in range(0, 60, 2)]
    assert all(sorted(blocks[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 30, 5))
    assert blocks == [Schedule(5, 2, seed=3).block(step) for step in range(0, 60, 2)]
    assert len({tuple(blocks[i : i + 5]) for i in range(0, 30, 5)}) > 1
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_sampled_visits_are_independent_draws() -> None:
    """Over 4,000 visits every block, and every pair of successive ones, as often as any other."""
    schedule = Schedule(4, 2, "sampled", seed=1)
    blocks = [schedule.block(step) for step in range(0, 8000, 2)]
    assert blocks == [
        Schedule(4, 2, "sampled", seed=1).block(step + 1) for step in range(0, 8000, 2)
    ]
    for length, wanted in ((1, 1000), (2, 250)):
        seen = Counter(zip(*(blocks[i:] for i in range(length)), strict=False))
        assert len(seen) == 4**length
        assert all(abs(n - wanted) < 5 * wanted**0.5 for n in seen.values())


@pytest.mark.parametrize("bad", [{"order": "up"}, {"steps": 0}, {"count": 0}, {"start": 4}])
def test_impossible_schedule_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        Schedule(**{"count": 4, "steps": 3, **bad})  # type: ignore[arg-type]


def test_stochastic_rounding_moves_the_mean() -> None:
    w = torch.full((2**20,), 0.02).to(torch.bfloat16)
    moved = w.float() - 5e-8
    assert torch.equal(moved.to(torch.bfloat16), w)
    out = stochastic_round(moved, key(0, "w", 7))
    shift = (out.double() - w.double()).mean().item()
    assert abs(shift + 5e-8) < 4 * 2.4e-9
    parts = [
        stochastic_round(part, key(0, "w", 7), i * 2**18) for i, part in enumerate(moved.chunk(4))
    ]
    assert torch.equal(torch.cat(parts), out)
    assert not torch.equal(stochastic_round(moved, key(0, "w", 8)), out)
