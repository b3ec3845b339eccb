"""The units of a search: coupled groups of a model, with channels joined into blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxmem.errors import BudgetError
from fxmem.prune.options import Prune
from fxmem.prune.projection import top
from fxmem.prune.units import Member
from fxmem.prune.wholes import parts_of_wholes


class Group(Protocol):
    """What a search needs of one group of coupled units (`fxmem.coupling`)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def cost(self) -> int: ...
    @property
    def consumer(self) -> tuple[Member, ...]: ...


FINE = 64
"""Groups with more units than this are searched in blocks; heads and experts one by one."""


@dataclass(frozen=True)
class Space:
    """Search units, numbered 0..n-1 over all groups.

    Attributes:
        groups: the groups searched, in the model's order.
        unit: per group int (size,), the search unit of each of its units.
        cost: float64 (n,), parameters of each search unit, or 1 where units are counted.
        layer: int (n,), decoder layer of each.
        owner: int (n,), the group of each, as an index into `groups`; the first one of a whole.
        block: channels per search unit.
        wholes: names of the groups that are searched as a whole -> the kind of the whole.
    """

    groups: tuple[Group, ...]
    unit: tuple[Tensor, ...]
    cost: Tensor
    layer: Tensor
    owner: Tensor
    block: int
    wholes: Mapping[str, str]

    @classmethod
    def build(
        cls,
        groups: Sequence[Group],
        options: Prune,
        importance: Mapping[str, Tensor],
        block: int | None = None,
    ) -> Space:
        """Join channels into blocks and number everything.

        Args:
            groups: groups of the kinds to be searched.
            options: block size, order of the channels, meaning of the budget.
            importance: per group name (size,); orders the channels of "importance" blocks.
            block: channels per unit instead of the options'.

        Raises:
            BudgetError: there is no group.
        """
        if not groups:
            raise BudgetError("no group of units to prune", advice="see fxmem.coupling(model)")
        whole = parts_of_wholes(groups, options.kinds)
        width = block or options.block
        units, costs, layers, owners = [], [], [], []
        made: dict[tuple[str, int], int] = {}
        for number, group in enumerate(groups):
            key = (whole.get(group.name, ""), group.layer)
            each = group.cost if options.cost == "parameters" else 1
            if key in made:  # a further group of a layer that is kept or removed as one
                units.append(torch.full((group.size,), made[key]))
                costs[made[key]] += group.size * group.cost * (options.cost == "parameters")
                continue
            first = len(costs)
            if key[0]:
                made[key] = first
                local = torch.zeros(group.size, dtype=torch.int64)
                size = [group.size * each if options.cost == "parameters" else 1]
            else:
                local = _blocks(group, width, options, importance)
                size = (torch.bincount(local) * each).tolist()
            units.append(first + local)
            costs += size
            layers += [group.layer] * len(size)
            owners += [number] * len(size)
        cost = torch.tensor(costs, dtype=torch.float64)
        parts = (cost, torch.tensor(layers), torch.tensor(owners))
        return cls(tuple(groups), tuple(units), *parts, width, whole)

    @property
    def budget_base(self) -> float:
        """Cost of all units; the budget is `keep` times this."""
        return float(self.cost.sum())

    def pool(self, values: Mapping[str, Tensor]) -> Tensor:
        """Mean of per-unit values over each search unit, by cost: float64 (n,)."""
        total = torch.zeros(len(self.cost), dtype=torch.float64)
        count = torch.zeros_like(total)
        for group, unit in zip(self.groups, self.unit, strict=True):
            weight = torch.full((len(unit),), float(group.cost), dtype=torch.float64)
            total.index_add_(0, unit, weight * values[group.name].double())
            count.index_add_(0, unit, weight)
        return total / count

    def bools(self, mask: Tensor) -> dict[str, Tensor]:
        """A mask over search units as one over each group's own units."""
        pairs = zip(self.groups, self.unit, strict=True)
        return {group.name: mask[unit] for group, unit in pairs}

    def final(self, s: Tensor, options: Prune) -> Tensor:
        """The deterministic mask at the budget, bool (n,), from probabilities or scores."""
        if options.ranking == "joint":
            return self._top(s, torch.ones(len(s), dtype=torch.bool), options)
        kept = torch.zeros(len(s), dtype=torch.bool)
        kinds = [self.wholes.get(group.name, group.kind) for group in self.groups]
        for kind in dict.fromkeys(kinds):
            mine = torch.tensor([k == kind for k in kinds])[self.owner]
            kept |= self._top(s, mine, options)
        return kept

    def _top(self, s: Tensor, among: Tensor, options: Prune) -> Tensor:
        index = among.nonzero()[:, 0]
        cost, owner = self.cost[index], self.owner[index]
        fine = torch.tensor([g.size > FINE and g.name not in self.wholes for g in self.groups])
        wanted = math.lcm(options.round_to, self.block) // self.block
        multiple = torch.where(fine, wanted, 1)
        kept = torch.zeros(len(s), dtype=torch.bool)
        budget = options.keep * float(cost.sum())
        kept[index[top(s[index], cost, budget, owner, multiple)]] = True
        return kept


def _blocks(group: Group, width: int, options: Prune, importance: Mapping[str, Tensor]) -> Tensor:
    """Search unit of each unit of one group, from 0: int (size,)."""
    width = width if group.size > FINE else 1
    rank = torch.arange(group.size)
    if width > 1 and options.order == "importance":
        order = torch.sort(importance[group.name], descending=True, stable=True).indices
        rank[order] = torch.arange(group.size)
    return rank // width


def start(space: Space, importance: Mapping[str, Tensor], options: Prune) -> Tensor:
    """Probabilities to start from: standardised importance through a sigmoid, at the keep rate.

    Comparable importance ("taylor") is standardised over the model, by cost; the others mean
    something within their own layer and group only. One shift of all logits meets the budget.
    """
    if options.init == "uniform":
        return torch.full_like(space.cost, options.keep)
    z = torch.logit(quantiles(space.pool(standardise(space, importance, options.init)), space.cost))
    logits = options.init_scale / 4 * z
    low, high = -40.0, 40.0
    budget = options.keep * space.budget_base
    for _ in range(60):
        shift = 0.5 * (low + high)
        spent = float(space.cost @ torch.sigmoid(logits + shift))
        low, high = (low, shift) if spent > budget else (shift, high)
    return torch.sigmoid(logits + low).clamp(options.epsilon, 1 - options.epsilon)


def quantiles(values: Tensor, cost: Tensor) -> Tensor:
    """Position of each value in the ranking by cost, inside (0, 1); outliers lose their reach."""
    order = torch.sort(values, stable=True).indices
    where = torch.empty_like(cost)
    where[order] = (cost[order].cumsum(0) - 0.5 * cost[order]) / cost.sum()
    return where


def standardise(space: Space, importance: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """Importance that can be ranked over the whole model, per group (size,)."""
    out = {}
    for group in space.groups:
        x = importance[group.name].double()
        if method == "taylor" or group.name in space.wholes:
            # A change of the loss: comparable everywhere, per parameter it frees. Of a whole group
            # nothing else is left to compare: over its units, standardised values sum to zero.
            out[group.name] = x / group.cost
        else:
            spread = x.std(correction=0)
            out[group.name] = (x - x.mean()) / (spread if spread > 0 else 1.0)
    return out
