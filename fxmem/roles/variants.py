"""Which variant of its programs each region runs in one step.

From the roles of the parameters follows, region by region from the input on: which gradients it
makes, whether anything before it learns (only then does it hand a gradient on), and whether it
learns at all. Regions before the first that learns run without autograd and save nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxmem.errors import RoleError
from fxmem.frontend.parameter_free import Leaf
from fxmem.roles.roles import Adapter, Role, RoleTable
from fxmem.runtime.region_code import RegionCode


@dataclass(slots=True)
class Selection:
    """One region in one step.

    Attributes:
        code: the region's programs, with adapters as further inputs where there are any.
        extra: tensors of the further inputs.
        roles: role of each input position that is a parameter.
        wanted: which inputs get a gradient.
        updates: parameters by input position whose gradient the backward consumes.
        reduced: shards by input position that move once their gradient is reduced.
        parameters: every parameter and adapter by input position.
        adapted: positions of the weights with adapters, in order of the further inputs.
        hands_on: the region makes the gradient of its input states.
    """

    code: RegionCode
    extra: list[nn.Parameter] = field(default_factory=list)
    roles: dict[int, Role] = field(default_factory=dict)
    wanted: list[bool] = field(default_factory=list)
    updates: dict[int, nn.Parameter] = field(default_factory=dict)
    reduced: dict[int, nn.Parameter] = field(default_factory=dict)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    adapted: list[int] = field(default_factory=list)
    hands_on: bool = False

    @property
    def learns(self) -> bool:
        return any(self.wanted)

    @property
    def variant(self) -> str:
        """Of the programs of `code`; gradients of updates keep the precision of their sums."""
        return self.code.variant(self.wanted, self.updates)

    @property
    def name(self) -> str:
        """``idle`` (forward only), ``active`` (the shallowest that learns) or ``tail``."""
        if not self.learns:
            return "idle"
        return "tail" if self.hands_on else "active"


Adapted = Callable[[RegionCode, Mapping[int, Adapter]], RegionCode]


def select(
    codes: Sequence[tuple[RegionCode, Sequence[Leaf], Sequence[Leaf]]],
    arguments: Mapping[Leaf, Any],
    table: RoleTable,
    adapted: Adapted,
    *,
    armed: bool,
    shard: Callable[[Any], Any] = lambda parameter: parameter,
) -> list[Selection]:
    """The variants of one call; ``codes`` holds code, inputs and outputs of each region in order.

    Args:
        arguments: values of the call's inputs; parameters are found here.
        adapted: the code of a region with the adapters of its inputs.
        armed: updates may happen; otherwise their parameters count as frozen.
        shard: of a parameter that is whole for the call: the one that roles are of.

    Raises:
        RoleError: a role that no program can honour.
    """
    learned: set[Leaf] = set()
    out = []
    for code, leaves, outputs in codes:
        chosen = _region(code, leaves, arguments, table, adapted, learned, armed, shard)
        if chosen.learns:
            learned.update(outputs)
        out.append(chosen)
    return out


def _region(
    code: RegionCode, leaves: Sequence[Leaf], arguments: Mapping[Leaf, Any], table: RoleTable,
    adapted: Adapted, learned: set[Leaf], armed: bool, shard: Callable[[Any], Any],
) -> Selection:  # fmt: skip
    chosen = Selection(code)
    adapters: dict[int, Adapter] = {}
    for i, leaf in enumerate(leaves):
        value = arguments.get(leaf)
        wanted = leaf in learned
        if isinstance(value, nn.Parameter):
            value = shard(value)
            chosen.parameters[i] = value
            chosen.roles[i] = role = table.role(value)
            _check(value, role)
            if (adapter := table.adapter(value)) is not None:
                adapters[i] = adapter
            wanted = role is Role.ACTIVE or (role is Role.UPDATE and armed)
        elif isinstance(value, Tensor):
            wanted = value.requires_grad
        chosen.wanted.append(wanted)
    if adapters:
        chosen.code = adapted(code, adapters)
        chosen.adapted = sorted(adapters)
        for i, adapter in sorted(adapters.items()):
            at = len(leaves) + len(chosen.extra)
            chosen.parameters |= {at: adapter.up, at + 1: adapter.down}
            chosen.extra += [adapter.up, adapter.down]
            chosen.wanted += [chosen.roles[i] is Role.LOW_RANK] * 2
    grads = chosen.code.joint.grads
    chosen.wanted = [w and g is not None for w, g in zip(chosen.wanted, grads, strict=True)]
    for i, role in chosen.roles.items():
        if role is Role.UPDATE and chosen.wanted[i]:
            spread = chosen.parameters[i] is not arguments[leaves[i]]
            (chosen.reduced if spread else chosen.updates)[i] = chosen.parameters[i]
    chosen.hands_on = any(
        w and leaf[0] == "main" for w, leaf in zip(chosen.wanted, leaves, strict=False)
    )
    return chosen


def _check(parameter: nn.Parameter, role: Role) -> None:
    if role in (Role.ACTIVE, Role.UPDATE) and not parameter.requires_grad:
        raise RoleError(
            f"a parameter of shape {tuple(parameter.shape)} has role {role.value}, but does not "
            "require a gradient",
            advice="set requires_grad before fxmem.transform, or make its role frozen",
        )


__all__ = ["Selection", "select"]
