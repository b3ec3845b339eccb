"""Where training stands in the schedule, and the cheap update of inactive blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxmem.blocks.order import Schedule
from fxmem.blocks.partition import Block, fingerprint
from fxmem.blocks.roles import Role, RoleTable
from fxmem.blocks.rounding import key, stochastic_round
from fxmem.errors import BlockStateError, PlanError


class BlockState(RoleTable):
    """Roles of the current step; `update` applies SGD or sign descent to inactive parameters.

    Args:
        model: the model; which parameters require grad must not change afterwards.
        blocks: the partition.
        schedule: which block is active when.
        inactive: the update of inactive parameters; None leaves them alone (BAdam).
        lr: its step size, scaled by the learning-rate schedule of the optimizer.
        reach: ``"all"`` or only ``"deeper"`` parameters than the active block's shallowest.

    Raises:
        PlanError: an option that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        schedule: Schedule,
        inactive: Literal["sgd", "sign"] | None = None,
        lr: float = 0.0,
        reach: Literal["deeper", "all"] = "deeper",
    ) -> None:
        if schedule.count != len(blocks):
            raise PlanError(f"the schedule has {schedule.count} blocks, not {len(blocks)}")
        if inactive not in (None, "sgd", "sign") or reach not in ("deeper", "all") or lr < 0:
            raise PlanError(f"inactive {inactive!r}, lr {lr}, reach {reach!r} cannot work")
        self.blocks, self.schedule = list(blocks), schedule
        self.inactive, self.lr, self.reach = inactive, lr, reach
        self.step = 0
        self.lr_scale = 1.0
        self.names = {p: n for n, p in model.named_parameters()}
        self._depth = {name: i for i, name in enumerate(self.names.values())}
        self._updated: set[str] = set()

    def set_use_order(self, depth: dict[str, int]) -> None:
        """Depth of the shallowest use of each parameter; registration order until this is called.

        Raises:
            BlockStateError: a parameter is missing.
        """
        if missing := [name for name in self._depth if name not in depth]:
            raise BlockStateError(f"the use order has no {missing[0]!r}")
        self._depth = dict(depth)

    @property
    def active(self) -> frozenset[str]:
        """Names of the active parameters."""
        return frozenset(self.blocks[self.schedule.block(self.step)].names)

    def role(self, parameter: nn.Parameter) -> Role:
        """The role of `parameter` in this step."""
        name = self.names.get(parameter)
        if name is None or not parameter.requires_grad:
            return super().role(parameter)
        active = self.active
        if name in active:
            return Role.ACTIVE
        if self.inactive is None:
            return Role.FROZEN
        # a tied weight counts at its shallowest use, so all its uses are downstream or none is
        shallowest = min(self._depth[other] for other in active)
        return Role.UPDATE if self.reach == "all" or self._depth[name] > shallowest else Role.FROZEN

    @torch.no_grad()
    def update(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Apply W - lr * grad, or its sign; bfloat16 weights are rounded stochastically.

        Raises:
            BlockStateError: `parameter` has no cheap update in this step, or had it already.
        """
        if self.role(parameter) is not Role.UPDATE:
            raise BlockStateError("an update was asked for a parameter that has none in this step")
        name = self.names[parameter]
        if name in self._updated:
            raise BlockStateError(
                f"{name!r} got a second gradient before the optimizer step",
                advice="gradient accumulation is not available with inactive updates",
            )
        move = grad.sign() if self.inactive == "sign" else grad
        lr = self.lr * self.lr_scale
        if parameter.dtype == torch.bfloat16:
            bits = key(self.schedule.seed, name, self.step)
            parameter.copy_(stochastic_round(parameter.float() - lr * move.float(), bits))
        else:
            parameter.sub_(lr * move)
        self._updated.add(name)

    def advance(self) -> bool:
        """Count one optimizer step; True where it ended a visit."""
        before = self.schedule.visit(self.step)[0]
        self.step += 1
        self._updated.clear()
        return self.schedule.visit(self.step)[0] != before

    def state_dict(self) -> dict[str, Any]:
        """Position and identity of the schedule, as plain values."""
        s = self.schedule
        return {
            "global_step": self.step,
            "partition": fingerprint(self.blocks),
            "schedule": [s.count, s.steps, s.order, s.seed, s.start, s.compat],
            "update": [self.inactive, self.lr, self.reach],
        }

    def check(self, saved: dict[str, Any]) -> None:
        """Refuse a saved state of another partition, schedule or update.

        Raises:
            BlockStateError: names what differs, saved and present.
        """
        for name, value in self.state_dict().items():
            if name != "global_step" and saved.get(name) != value:
                raise BlockStateError(f"saved {name} {saved.get(name)!r}, present {value!r}")
