"""The units of a search: coupled groups of a model, with channels joined into blocks.

Where whole blocks or layers are searched, all units of their groups are one search unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmem.errors import BudgetError, PlanError
from fxmem.prune.search.projection import top
from fxmem.prune.units.kinds import bundle
from fxmem.prune.units.settings import ScoreSettings, Settings
from fxmem.prune.units.units import Group

FINE = 64
"""Groups with more units than this are searched in blocks; heads and experts one by one."""
CHANNELS = ("mlp_channels", "channels", "width")
"""Kinds whose counts are rounded in groups of any size."""


@dataclass(frozen=True)
class Space:
    """Search units, numbered 0..n-1 over all groups.

    Attributes:
        groups: the groups searched, in the model's order.
        unit: per group int (size,), the search unit of each of its units.
        cost: float64 (n,), parameters of each search unit, or 1 where units are counted.
        layer: int (n,), decoder layer of each.
        owner: int (n,), the group of each, as an index into `groups`; of a layer the first.
        block: channels per search unit.
        bundles: per group the block that it goes whole with, None where its units go one by one.
        reserve: per group its units, those first that are put back where a drawn mask keeps fewer
            experts than a token chooses.
    """

    groups: tuple[Group, ...]
    unit: tuple[Tensor, ...]
    cost: Tensor
    layer: Tensor
    owner: Tensor
    block: int
    bundles: tuple[tuple[str, str] | None, ...]
    reserve: tuple[Tensor, ...]

    @classmethod
    def build(
        cls,
        groups: Sequence[Group],
        options: Settings,
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
            PlanError: uniform widths of what has none.
            BudgetError: there is no group, or the budget does not pay for as many experts as a
                token chooses.
        """
        if not groups:
            raise BudgetError("no group of units to prune", advice="see fxmem.coupling(model)")
        bundles = tuple(bundle(g.name, g.kind, options.kinds) for g in groups)
        if options.uniform and (any(bundles) or options.ranking != "joint"):
            raise PlanError(
                "uniform widths of whole blocks, or under a budget for each kind",
                advice="Prune(uniform=True) with kinds of heads, channels or experts",
            )
        units, layers, owners, first = [], [], [], 0
        whole: dict[tuple[str, str], int] = {}
        for number, (group, at) in enumerate(zip(groups, bundles, strict=True)):
            if at is not None and at in whole:
                units.append(torch.full((group.size,), whole[at]))
                continue
            local = _local(group, at is not None, options, importance, block)
            count = int(local.max()) + 1 if len(local) else 0
            if at is not None and count:
                whole[at] = first
            units.append(first + local)
            layers += [group.layer] * count
            owners += [number] * count
            first += count
        cost = torch.zeros(first, dtype=torch.float64)
        for group, unit, at in zip(groups, units, bundles, strict=True):
            if options.cost == "parameters" or at is None:
                price = float(group.cost) if options.cost == "parameters" else 1.0
                cost.index_add_(0, unit, torch.full((len(unit),), price, dtype=torch.float64))
            else:
                cost[unit] = 1.0
        reserve = tuple(_reserve(group, importance) for group in groups)
        space = cls(
            tuple(groups), tuple(units), cost, torch.tensor(layers), torch.tensor(owners),
            block or options.grain, bundles, reserve,
        )  # fmt: skip
        if any(map(least, groups)):
            space.final(torch.zeros_like(cost), options)
        return space

    @property
    def budget_base(self) -> float:
        """Cost of all units; the budget is `keep` times this."""
        return float(self.cost.sum())

    def pool(self, values: Mapping[str, Tensor]) -> Tensor:
        """Mean of per-unit values over each search unit, of blocks by parameter: float64 (n,)."""
        total = torch.zeros(len(self.cost), dtype=torch.float64)
        count = torch.zeros_like(total)
        for group, unit, at in zip(self.groups, self.unit, self.bundles, strict=True):
            weight = 1.0 if at is None else float(group.cost)
            total.index_add_(0, unit, values[group.name].double() * weight)
            count.index_add_(0, unit, torch.full((len(unit),), weight, dtype=torch.float64))
        return total / count

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum of per-unit values over each search unit: float64 (n,)."""
        out = torch.zeros(len(self.cost), dtype=torch.float64)
        for group, unit in zip(self.groups, self.unit, strict=True):
            out.index_add_(0, unit, values[group.name].double())
        return out

    def bools(self, mask: Tensor) -> dict[str, Tensor]:
        """A mask over search units as one over each group's own units.

        A mask with too few experts gets the most important others back: the loss of a mask is that
        of the sub-model that can run.
        """
        out = {}
        for group, unit, reserve in zip(self.groups, self.unit, self.reserve, strict=True):
            kept = mask[unit]
            if (lacking := least(group) - int(kept.sum())) > 0:
                kept[reserve[~kept[reserve]][:lacking]] = True
            out[group.name] = kept
        return out

    def final(self, s: Tensor, options: Settings) -> Tensor:
        """The deterministic mask at the budget, bool (n,), from probabilities or scores.

        Raises:
            BudgetError: the budget does not pay for as many experts as a token chooses.
        """
        if options.uniform:
            return self._uniform(s.double(), options)
        forced = self._forced(s)
        ranked = torch.where(forced, math.inf, s.double())
        kept = torch.zeros(len(s), dtype=torch.bool)
        if options.ranking == "joint":
            kept = self._top(ranked, ~kept, options)
        else:
            pairs = zip(self.groups, self.bundles, strict=True)
            kinds = [group.kind if at is None else at[0] for group, at in pairs]
            for kind in dict.fromkeys(kinds):
                mine = torch.tensor([k == kind for k in kinds])[self.owner]
                kept |= self._top(ranked, mine, options)
        if bool((forced & ~kept).any()):
            at = int((forced & ~kept).nonzero()[0])
            group = self.groups[int(self.owner[at])]
            raise BudgetError(
                f"keep={options.keep:g} leaves fewer than {least(group)} {group.kind} in "
                f"{group.name}, as many as must stay: experts that a token chooses, or one channel",
                advice="a larger keep, or fewer experts per token in the dense model",
            )
        return kept

    def _forced(self, s: Tensor) -> Tensor:
        """The best units of each group that must keep some: bool (n,)."""
        forced = torch.zeros(len(s), dtype=torch.bool)
        for group, unit in zip(self.groups, self.unit, strict=True):
            order = torch.sort(s[unit], descending=True, stable=True).indices
            forced[unit[order[: least(group)]]] = True
        return forced

    def _uniform(self, s: Tensor, options: Settings) -> Tensor:
        """As `final`, with as many units in all groups of one kind and size.

        The r-th best units of these groups go together, ranked by their mean score.
        """
        alike: dict[tuple[str, int], list[int]] = {}
        for number, group in enumerate(self.groups):
            alike.setdefault((group.kind, len(self.unit[number].unique())), []).append(number)
        score, cost, owner, rows, forced = [], [], [], [], []
        for kind, numbers in enumerate(alike.values()):
            units = [self.unit[number].unique() for number in numbers]
            order = [u[torch.sort(s[u], descending=True, stable=True).indices] for u in units]
            for rank, row in enumerate(torch.stack(order, 1)):
                rows.append(row)
                forced.append(rank < max(least(self.groups[number]) for number in numbers))
                score.append(math.inf if forced[-1] else float(s[row].mean()))
                cost.append(float(self.cost[row].sum()))
                owner.append(kind)
        first = torch.tensor([numbers[0] for numbers in alike.values()])
        kept = top(
            torch.tensor(score, dtype=torch.float64), torch.tensor(cost, dtype=torch.float64),
            options.keep * self.budget_base, torch.tensor(owner), self._multiple(options)[first],
        )  # fmt: skip
        if any(f and not k for f, k in zip(forced, kept.tolist(), strict=True)):
            raise BudgetError(f"keep={options.keep:g} leaves fewer experts than a token chooses")
        mask = torch.zeros(len(s), dtype=torch.bool)
        for row in (row for row, k in zip(rows, kept.tolist(), strict=True) if k):
            mask[row] = True
        return mask

    def _multiple(self, options: Settings) -> Tensor:
        """Per group the search units that are kept or left together: int (groups,)."""
        found = []
        for group, at in zip(self.groups, self.bundles, strict=True):
            fine = _fine(group, at is not None)
            channels = group.kind in CHANNELS and at is None
            block = self.block if fine else 1
            wanted = math.lcm(options.round_to, block) // block if fine or channels else 1
            found.append(max(1, min(wanted, -(-group.size // block))))
        return torch.tensor(found)

    def _top(self, s: Tensor, among: Tensor, options: Settings) -> Tensor:
        index = among.nonzero()[:, 0]
        cost, owner = self.cost[index], self.owner[index]
        kept = torch.zeros(len(s), dtype=torch.bool)
        budget = options.keep * float(cost.sum())
        kept[index[top(s[index], cost, budget, owner, self._multiple(options))]] = True
        return kept


def least(group: Group) -> int:
    """Units that a group must keep."""
    return int(getattr(group, "least", 0))


def _fine(group: Group, whole: bool) -> bool:
    """Whether the units of a group are searched in blocks."""
    return group.size > FINE and not whole and not least(group)


def _local(
    group: Group,
    whole: bool,
    options: Settings,
    importance: Mapping[str, Tensor],
    block: int | None,
) -> Tensor:
    """The search unit of each unit of one group, counted from 0: int (size,)."""
    if whole:
        return torch.zeros(group.size, dtype=torch.long)
    width = (block or options.grain) if _fine(group, whole) else 1
    rank = torch.arange(group.size)
    if width > 1 and isinstance(options, ScoreSettings) and options.order == "importance":
        order = torch.sort(importance[group.name], descending=True, stable=True).indices
        rank[order] = torch.arange(group.size)
    return rank // width


def _reserve(group: Group, importance: Mapping[str, Tensor]) -> Tensor:
    if not least(group):
        return torch.arange(0)
    return torch.sort(importance[group.name], descending=True, stable=True).indices


def start(space: Space, importance: Mapping[str, Tensor], options: ScoreSettings) -> Tensor:
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
    """Importance that can be ranked over the whole model, per group (size,).

    Units of one group are compared within it. A group that goes whole is compared, by its mean per
    parameter, with the others of its kind.
    """
    out = {}
    means: dict[str, dict[str, Tensor]] = {}
    for group, at in zip(space.groups, space.bundles, strict=True):
        x = importance[group.name].double()
        if method == "taylor":
            # A change of the loss: comparable everywhere, per parameter it frees.
            out[group.name] = x / group.cost
        elif at is None:
            out[group.name] = _normal(x)
        elif group.size:
            means.setdefault(group.kind, {})[group.name] = x.mean() / group.cost
        else:
            out[group.name] = x
    for table in means.values():
        normal = _normal(torch.stack(list(table.values())))
        for name, value in zip(table, normal, strict=True):
            out[name] = value.expand(len(importance[name]))
    return out


def _normal(x: Tensor) -> Tensor:
    spread = x.std(correction=0)
    return (x - x.mean()) / (spread if spread > 0 else 1.0)
