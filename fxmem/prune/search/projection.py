"""The budget: exact projection of keep probabilities, and the final mask.

The feasible set is ``sum(c * s) <= budget`` and ``low <= s <= 1 - low``. Its projection in the
metric ``sum((x - s)^2 / w)`` is ``clip(s - v * w * c, low, 1 - low)`` with one multiplier v >= 0;
w = 1 is the Euclidean one. The residual ``sum(c * clip(s - v * w * c)) - budget`` falls
monotonically in v, piecewise linear, so a safeguarded Newton iteration ends after a handful of
passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmem.errors import BudgetError


def project(
    s: Tensor, cost: Tensor, budget: float, low: float, weight: Tensor | None = None
) -> Tensor:
    """Nearest probabilities that keep the budget.

    Args:
        s: float64 (n,), any real numbers.
        cost: float64 (n,), positive, in the unit of `budget` (parameters).
        budget: largest allowed sum of ``cost * s``.
        low: every probability stays in [low, 1 - low].
        weight: (n,), positive, the inverse of the metric's diagonal; None for the Euclidean one.

    Raises:
        BudgetError: even the lowest probabilities cost more than the budget.
    """
    total = float(cost.sum())
    if low * total > budget + 1e-9 * max(1.0, total):
        raise BudgetError(
            f"{low:g} of all {total:g} parameters is more than the budget of {budget:g}",
            advice="a smaller epsilon, or a larger keep",
        )
    high = 1.0 - low
    normal = cost if weight is None else cost * weight

    def at(v: float) -> Tensor:
        return (s - v * normal).clamp(low, high)

    def excess(x: Tensor) -> float:
        return float(cost @ x) - budget

    found = at(0.0)
    if (over := excess(found)) <= 0:
        return found
    left, right = 0.0, float(((s - low) / normal).max())
    v = 0.0
    for _ in range(100):
        moved = s - v * normal
        inside = (moved > low) & (moved < high)
        slope = float((cost * normal)[inside].sum())
        v = v + over / slope if slope > 0 else 0.5 * (left + right)
        if not left <= v <= right:
            v = 0.5 * (left + right)
        found = at(v)
        over = excess(found)
        if over > 0:
            left = v
        else:
            right = v
        if abs(over) <= 1e-13 * budget or right - left <= 1e-16 * right:
            break
    return found


def top(
    s: Tensor,
    cost: Tensor,
    budget: float,
    group: Tensor | None = None,
    multiple: Tensor | int = 1,
) -> Tensor:
    """The most probable units that fit: bool (n,), ties by index, the unfitting skipped.

    Args:
        s: scores (n,), higher is kept first.
        cost: (n,), in the unit of `budget`.
        budget: largest cost of the kept units.
        group: int (n,), the sliced axis of each unit; needed where `multiple` is not 1.
        multiple: kept units per group are a multiple of this (one number, or one per group), for
            kernels that want round sizes. A group's worst units go first, and what that frees is
            spent on whole multiples of the best units left.
    """
    order = torch.sort(s, descending=True, stable=True).indices
    step = torch.as_tensor(multiple)
    if group is None or bool((step == 1).all()):
        return _fill(order.tolist(), cost, budget)
    size = int(group.max()) + 1
    steps = step.expand(size).tolist()
    spent, kept = 0.0, torch.zeros(len(s), dtype=torch.bool)
    # Whole multiples in the order in which each becomes complete; a tail that fills none stays out.
    waiting: list[list[int]] = [[] for _ in range(size)]
    for unit, owner in zip(order.tolist(), group[order].tolist(), strict=True):
        bundle = waiting[owner]
        bundle.append(unit)
        if len(bundle) < steps[owner]:
            continue
        price = float(cost[bundle].sum())
        if spent + price <= budget * (1 + 1e-12):
            kept[bundle] = True
            spent += price
        waiting[owner] = []
    return kept


def _fill(order: list[int], cost: Tensor, budget: float) -> Tensor:
    prices = cost.tolist()
    kept = torch.zeros(len(prices), dtype=torch.bool)
    chosen, spent, limit = [], 0.0, budget * (1 + 1e-12)
    for unit in order:
        if spent + prices[unit] <= limit:
            spent += prices[unit]
            chosen.append(unit)
    kept[chosen] = True
    return kept
