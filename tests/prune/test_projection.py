"""The exact projection onto the budget, and the final mask."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from fxmem.errors import BudgetError
from fxmem.prune.search.projection import project, top

TIGHT = 1e-12


def close(a: Tensor, b: Tensor, at: float = TIGHT) -> None:
    torch.testing.assert_close(a, b, rtol=at, atol=at)


def check_kkt(s: Tensor, cost: Tensor, budget: float, low: float) -> None:
    x = project(s, cost, budget, low)
    assert float(cost @ x) <= budget + 1e-9
    inside = (x > low) & (x < 1 - low)
    v = ((s - x) / cost)[inside]
    if len(v):
        assert float(v.max() - v.min()) <= TIGHT
        assert float(v.min()) >= -TIGHT
        assert float(v.mean()) * (budget - float(cost @ x)) <= 1e-9
        level = v.mean()
        assert bool((s - level * cost <= low + TIGHT)[x == low].all())
        assert bool((s - level * cost >= 1 - low - TIGHT)[x == 1 - low].all())
    close(project(x, cost, budget, low), x)


@pytest.mark.parametrize("low", [0.0, 0.01])
@pytest.mark.parametrize("seed", range(5))
def test_projection_meets_the_optimality_conditions(low: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    cost = 1 + 9 * torch.rand(50, generator=g, dtype=torch.float64)
    s = torch.rand(50, generator=g, dtype=torch.float64) * 2 - 0.5
    total = float(cost.sum())
    for part in (low + 1e-6, 0.1, 0.5, 0.9, 1.0):
        check_kkt(s, cost, part * total, low)
    check_kkt(torch.zeros_like(s), cost, 0.5 * total, low)
    check_kkt(torch.ones_like(s), cost, 0.5 * total, low)


def test_projection_in_another_metric() -> None:
    g = torch.Generator().manual_seed(2)
    cost = 1 + 9 * torch.rand(50, generator=g, dtype=torch.float64)
    s = torch.rand(50, generator=g, dtype=torch.float64) * 2 - 0.5
    weight = 0.01 + torch.rand(50, generator=g, dtype=torch.float64)
    x = project(s, cost, 0.4 * float(cost.sum()), 0.01, weight)
    assert abs(float(cost @ x) - 0.4 * float(cost.sum())) <= 1e-9
    v = ((s - x) / (cost * weight))[(x > 0.01) & (x < 0.99)]
    assert float(v.max() - v.min()) <= TIGHT and float(v.min()) > 0
    close(project(s, cost, 0.4 * float(cost.sum()), 0.01, torch.ones_like(s)),
          project(s, cost, 0.4 * float(cost.sum()), 0.01))  # fmt: skip


def test_projection_of_many_units(capsys: pytest.CaptureFixture[str]) -> None:
    """The time is printed, not asserted: it is the machine's as much as ours."""
    n = 400_000
    g = torch.Generator().manual_seed(1)
    s = torch.rand(n, generator=g, dtype=torch.float64) * 1.4 - 0.2
    cost = torch.where(torch.rand(n, generator=g) < 0.9, 96.0, 4096.0).double()
    budget, seconds = 0.3 * float(cost.sum()), []
    for _ in range(3):
        start = time.perf_counter()
        x = project(s, cost, budget, 0.01)
        seconds.append(time.perf_counter() - start)
    assert abs(float(cost @ x) - budget) <= 1e-9 * budget
    v = ((s - x) / cost)[(x > 0.01) & (x < 0.99)]
    assert len(v) > 0
    assert float(v.max() - v.min()) <= TIGHT
    with capsys.disabled():
        print(f" [projection of {n:,} units: {min(seconds) * 1e3:.0f} ms]", end="")


def test_projection_at_the_ends() -> None:
    cost = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    s = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64)
    close(project(s, cost, 0.0, 0.0), torch.zeros_like(s))
    assert torch.equal(project(s, cost, 7.0, 0.0), s)
    with pytest.raises(BudgetError, match="budget"):
        project(s, cost, 0.05, 0.01)


def test_final_mask_fills_the_budget_in_order() -> None:
    s = torch.tensor([0.5, 0.9, 0.5, 0.8, 0.1])
    cost = torch.tensor([1.0, 3.0, 1.0, 4.0, 1.0])
    assert top(s, cost, 5.0).tolist() == [True, True, True, False, False]
    group = torch.tensor([0, 0, 0, 1, 0])
    assert top(s, cost, 5.0, group, multiple=2).tolist() == [True, True, False, False, False]
