"""Where training stands in the schedule, and the cheap update of inactive blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.blocks import adapters as low_rank
from fxmem.blocks.order import Schedule
from fxmem.blocks.partition import build, fingerprint
from fxmem.blocks.policies import Clip, Guard, check_world, mean_over_processes
from fxmem.blocks.roles import Adapter, Role, RoleTable
from fxmem.blocks.rounding import key, stochastic_round
from fxmem.errors import BlockStateError, PlanError
from fxmem.plan_blocks import SGD, Blocks, LowRank, SignSGD


class BlockState(RoleTable):
    """Roles of the current step; :meth:`update` moves inactive parameters.

    Args:
        model: the model; which parameters require grad must not change afterwards.
        plan: partition, schedule, inactive update and policies.

    Attributes:
        step: optimizer steps so far.
        lr_scale: the optimizer's learning rate over its first one, read at every update.
        is_last_micro_batch: for ``accumulation="last"``, read at every forward: whether the
            backward of this forward is the last before the optimizer step.

    Raises:
        PlanError: an option that cannot work with this model.
    """

    def __init__(self, model: nn.Module, plan: Blocks) -> None:
        super().__init__()
        self.plan, self.parts = plan, build(model, plan)
        self.blocks = self.parts.blocks
        if plan.start >= len(self.blocks):
            raise PlanError(f"start is {plan.start}, but there are {len(self.blocks)} blocks")
        compat = plan.compat is not None
        self.schedule = Schedule(
            len(self.blocks), plan.steps, plan.order, plan.seed, plan.start, compat
        )
        self.step = 0
        self.lr_scale: Callable[[], float] = lambda: 1.0
        self.is_last_micro_batch: Callable[[], bool] = lambda: True
        self.names = {p: n for n, p in model.named_parameters()}
        self.shapes = {n: tuple(p.shape) for p, n in self.names.items()}
        self.guard, self.clip = Guard(), Clip(plan.clip, plan.clip_norm)
        self._model = weakref.ref(model)
        self._order = {p: i for i, p in enumerate(self.names)}
        self._moved: dict[str, int] = {}
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._forwards = 0
        self._cache: dict[nn.Parameter, Role] = {}
        self.adapters: dict[str, Adapter] = {}
        if isinstance(plan.inactive, LowRank):
            names = {n for b in self.blocks for n in b.names} | set(self.parts.inactive)
            if not plan.update_head:
                names -= set(self.parts.head)
            self.adapters = low_rank.create(model, plan.inactive, names, plan.seed)
        by_name = {n: p for p, n in self.names.items()}
        self._adapters = {by_name[n]: a for n, a in self.adapters.items()}

    def table(self) -> BlockState:
        """Begin a forward; the table that it follows.

        Raises:
            BlockStateError: weights moved since the last optimizer step and no accumulation policy
                is named, or several processes train without averaging.
        """
        model = self._model()
        if model is None or not model.training:
            return self
        check_world(self.plan.average)
        if self._moved and self.plan.accumulation in (None, "last"):
            raise BlockStateError(
                "a second forward before the optimizer step, but inactive weights have moved",
                advice='name Blocks(accumulation="micro", "last" or "accumulate"); for "last" set '
                "is_last_micro_batch; run forwards that do not train under no_grad",
            )
        self._forwards += 1
        self._cache.clear()
        return self

    def tell_order(self, first_use: Mapping[nn.Parameter, int]) -> None:
        """First use of each parameter in the captured graph."""
        if first_use != self._order:
            self._order = dict(first_use)
            self._cache.clear()

    @property
    def active(self) -> frozenset[str]:
        """Names of the parameters that AdamW trains in this step."""
        return self._active(self.step)

    def _active(self, step: int) -> frozenset[str]:
        names = self.blocks[self.schedule.block(step)].names
        return frozenset((*names, *self.parts.always))

    def role(self, parameter: nn.Parameter) -> Role:
        if not self._cache:
            self._cache = self.roles_at(self.step)
        found = self._cache.get(parameter)
        return super().role(parameter) if found is None else found

    def roles_at(self, step: int) -> dict[nn.Parameter, Role]:
        """Role of every parameter in an optimizer step, past or to come."""
        block = set(self.blocks[self.schedule.block(step)].names)
        active, frozen = self._active(step), set(self.parts.frozen)
        if not self.plan.update_head:
            frozen |= set(self.parts.head)
        # a tied weight counts at its first use, so all its uses are downstream or none is
        first = min((self._order[p] for p, n in self.names.items()
                     if n in block and p in self._order), default=-1)  # fmt: skip
        roles = {}
        for p, name in self.names.items():
            reached = self.plan.reach == "all" or self._order.get(p, -1) > first
            if name in active:
                roles[p] = Role.ACTIVE
            elif self.plan.inactive is None or name in frozen or not p.requires_grad or not reached:
                roles[p] = Role.FROZEN
            elif isinstance(self.plan.inactive, LowRank):
                roles[p] = Role.LOW_RANK
            elif self.plan.accumulation == "last" and not self.is_last_micro_batch():
                roles[p] = Role.FROZEN
            else:
                roles[p] = Role.UPDATE
        return roles

    def sgd_rate(self, parameter: nn.Parameter) -> float | None:
        plan, kind = self.plan, self.plan.inactive
        plain = not (plan.guard or plan.average) and plan.clip == "none"
        if not isinstance(kind, SGD) or not plain or plan.accumulation == "accumulate":
            return None
        if parameter.dtype not in (torch.float32, torch.float64):
            return None
        return kind.lr * self.lr_scale() * self._micro_batches()

    def _micro_batches(self) -> int:
        return self._forwards if self.plan.accumulation == "last" else 1

    def complete(self, parameter: nn.Parameter, grad: Tensor | None) -> None:
        if grad is None:  # the compiler has moved it at `sgd_rate`
            name = self.names[parameter]
            self._moved[name] = self._moved.get(name, 0) + 1
        super().complete(parameter, grad)

    def update(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """W - lr * c * grad, or its sign; bfloat16 weights are rounded stochastically.

        Raises:
            BlockStateError: `parameter` has no cheap update in this step, or had it already.
        """
        name = self.names.get(parameter)
        if name is None or self.role(parameter) is not Role.UPDATE:
            raise BlockStateError("an update was asked for a parameter that has none in this step")
        if self.plan.accumulation == "accumulate":
            if parameter in self._kept:
                self._kept[parameter] += grad
            else:
                self._kept[parameter] = grad.clone()
            return
        if name in self._moved and self.plan.accumulation != "micro":
            raise BlockStateError(f"{name!r} got a second gradient before the optimizer step")
        count = self._micro_batches()
        self._apply_update(parameter, grad if count == 1 else grad * count)

    @torch.no_grad()
    def _apply_update(self, parameter: nn.Parameter, grad: Tensor) -> None:
        kind, name = self.plan.inactive, self.names[parameter]
        assert isinstance(kind, (SGD, SignSGD))
        if self.plan.average:
            grad = mean_over_processes(grad.clone())
        if self.plan.guard:
            self.guard.check(grad)
        move = self.clip(grad, sum(r is Role.UPDATE for r in self._cache.values()))
        if isinstance(kind, SignSGD):
            move = move.sign()
        micro = self._moved.get(name, 0)
        self._moved[name] = micro + 1
        lr = kind.lr * self.lr_scale()
        down = self.guard.down(parameter.device) if self.plan.guard else True
        if down is False:
            return
        if parameter.dtype == torch.bfloat16:
            bits = key(self.plan.seed, name, self.step, micro)
            moved = stochastic_round(parameter.float() - lr * move.float(), bits)
        elif down:
            parameter.add_(move, alpha=-lr)
            return
        else:
            moved = parameter - lr * move
        parameter.copy_(self.guard.select(moved, parameter) if self.plan.guard else moved)

    def finish_backwards(self) -> None:
        """Apply what waits for a backward that never ran, and sums over micro-batches."""
        self.flush()
        for parameter in list(self._kept):
            self._apply_update(parameter, self._kept.pop(parameter))

    def advance(self) -> bool:
        """Count one optimizer step; True where it ended a visit."""
        before = self.schedule.visit(self.step)[0]
        self.step += 1
        self.clip.end_step()
        self.guard.clear()
        self._moved.clear()
        self._cache.clear()
        self._forwards = 0
        return self.schedule.visit(self.step)[0] != before

    def state_dict(self) -> dict[str, Any]:
        """Position and identity of the schedule, and the low-rank terms."""
        s = self.schedule
        visit, inside = s.visit(self.step)
        return {
            "global_step": self.step, "visit": visit, "steps_in_visit": inside,
            "permutation": s.permutation(visit // s.count),
            "partition": fingerprint(self.shapes, self.parts),
            "schedule": [s.count, s.steps, s.order, s.seed, s.start, s.compat],
            "update": [type(self.plan.inactive).__name__, self.plan.reach],
            "last_norm": self.clip.last_norm,
            "adapters": low_rank.values(self.adapters),
        }  # fmt: skip

    def check(self, saved: Mapping[str, Any]) -> None:
        """Refuse a saved state of another partition, schedule or update.

        Raises:
            BlockStateError: names what differs, saved and present.
        """
        here = self.state_dict()
        wrong = [
            f"{name}: saved {saved.get(name)!r}, present {here[name]!r}"
            for name in ("partition", "schedule", "update")
            if saved.get(name) != here[name]
        ]
        if wrong:
            raise BlockStateError("; ".join(wrong), advice="resume with the plan of the saved run")
        low_rank.check(self.adapters, saved["adapters"])

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over a checked state."""
        self.step = int(saved["global_step"])
        self.clip.last_norm = saved["last_norm"]
        low_rank.load(self.adapters, saved["adapters"])
        self._cache.clear()


__all__ = ["BlockState"]
