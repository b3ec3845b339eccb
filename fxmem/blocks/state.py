"""Where training stands in the schedule, and the cheap update of inactive blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import graph as _compat
from fxmem.blocks import adapters as low_rank
from fxmem.blocks import foreign
from fxmem.blocks.averaging import Averager
from fxmem.blocks.move import move
from fxmem.blocks.order import Schedule
from fxmem.blocks.partition import build
from fxmem.blocks.policies import (
    Clip,
    Guard,
    check_precision,
    check_world,
    is_last_micro_batch,
)
from fxmem.blocks.ranks import Ranks
from fxmem.blocks.rounding import key
from fxmem.blocks.shards import first_element, is_shard, local
from fxmem.distributed.sequence import digest
from fxmem.errors import BlockStateError, PlanError
from fxmem.plan.blocks import SGD, Blocks, LowRank, SignSGD
from fxmem.roles.kernel_update import Rule
from fxmem.roles.roles import Adapter, Role, RoleTable


class BlockState(RoleTable):
    """Roles of the current step; :meth:`update` moves inactive parameters.

    Args:
        model: the model; which parameters require grad must not change afterwards.
        plan: partition, schedule, inactive update and policies.

    Attributes:
        step: optimizer steps so far.
        lr_scale: the optimizer's learning rate over its first one, read at every update.
        is_last_micro_batch: for ``accumulation="last"``, read at every forward: whether the
            backward of this forward is the last before the optimizer step; at first what
            accelerate says.
        optimizer: the one optimizer of this state, once there is one.

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
        self.is_last_micro_batch: Callable[[], bool] = is_last_micro_batch
        self.optimizer: Callable[[], Any] = lambda: None
        self.guard, self.clip = Guard(), Clip(plan.clip, plan.clip_norm)
        foreign.watch()
        self._model = weakref.ref(model)
        self._moved: dict[str, int] = {}
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._backwards, self._backward, self._held = 0, -1, False
        self._cache: dict[nn.Parameter, Role] = {}
        self.ranks = Ranks()
        self.adapters: dict[str, Adapter] = {}
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        if isinstance(plan.inactive, LowRank):
            names = {n for b in self.blocks for n in b.names} | set(self.parts.inactive)
            if not plan.update_head:
                names -= set(self.parts.head)
            self.adapters = low_rank.create(model, plan.inactive, names, plan.seed)
        self._name(dict(model.named_parameters()))

    def _name(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Know the model's parameters by these objects."""
        self.names = {p: n for n, p in parameters.items()}
        self.sharded = next((p for p in self.names if is_shard(p)), None)
        self.averages = self.sharded is None and (self.plan.average or self.ranks.wrapped)
        self._averager = Averager(self.names, self._move, self.ranks.group)
        self._order = {p: i for i, p in enumerate(self.names)}
        self._adapters = {parameters[n]: a for n, a in self.adapters.items()}
        self._cache.clear()
        fixed = set(self.parts.frozen)
        for p, n in self.names.items():
            if self.sharded is not None and p.requires_grad and not is_shard(p) and n not in fixed:
                raise PlanError(
                    f"parameter `{n}` is not sharded, so nothing reduces its gradient",
                    advice="leave it to fully_shard, or name it in Blocks(frozen=...)",
                )

    def follow(self) -> None:
        """Take over parameters by name where ``fully_shard`` has put shards in their place, in the
        model and in its optimizer.

        Raises:
            PlanError: a parameter that learns is not sharded among others that are.
        """
        if (model := self._model()) is None:
            return
        now = dict(model.named_parameters())
        if all(p in self.names for p in now.values()):
            return
        optimizer = self.optimizer()
        if {n: tuple(p.shape) for n, p in now.items()} != self.shapes:
            return  # what reads them next says so
        if optimizer is not None and not optimizer.adopt(now):
            return
        self._name(now)

    def inside(self, wrapper: Any) -> None:
        """A forward begins, in this DistributedDataParallel or in none.

        Raises:
            RoleError: it does what blocks cannot do in its place.
        """
        if (model := self._model()) is not None and self.ranks.enter(wrapper, model):
            self._name(dict(model.named_parameters()))

    def average(self) -> None:
        """What AdamW is going to take becomes the mean over all ranks, once."""
        active, terms = self.active, self.adapters.values()
        taken = [p for p, n in self.names.items() if n in active]
        self.ranks.average(taken + [t for a in terms for t in (a.up, a.down)])

    def table(self) -> BlockState:
        """Begin a forward; the table that it follows.

        Raises:
            BlockStateError: weights moved since the last optimizer step and no accumulation policy
                is named, or several processes train without averaging.
            DivergedError: processes that average have different plans.
        """
        model = self._model()
        if model is None or not model.training:
            return self
        check_world(self.averages or self.sharded is not None)
        if self.averages:
            learn = [n for p, n in self.names.items() if p.requires_grad]
            facts = {
                "plans": digest(self.plan), "parameters that learn": digest(learn),
                "numbers of steps": self.step,
            }  # fmt: skip
            self.ranks.agree(facts, next(iter(self.names)).device)
        if isinstance(self.plan.inactive, (SGD, SignSGD)):
            check_precision(self.names)
        if (optimizer := self.optimizer()) is not None:
            optimizer.check_parameters()
        if self._moved and self.plan.accumulation in (None, "last"):
            raise BlockStateError(
                "a second forward before the optimizer step, but inactive weights have moved",
                advice='name Blocks(accumulation="micro", "last" or "accumulate"); for "last" set '
                "is_last_micro_batch; run forwards that do not train under no_grad",
            )
        self._cache.clear()
        self.adapters_of_all()
        return self

    def adapters_of_all(self) -> Mapping[nn.Parameter, Adapter]:
        low_rank.follow(self._adapters)
        return self._adapters

    def begin_backward(self, number: int) -> None:
        """Count the backward passes of this optimizer step.

        Raises:
            BlockStateError: there is no optimizer that could end the step.
        """
        if self.optimizer() is None:
            raise BlockStateError(
                "a backward of a model with Plan(blocks=...) that has no BlockAdamW: its active "
                "block would never change",
                advice=foreign.ADVICE,
            )
        if number == self._backward:
            return
        self._backwards += 1
        self._backward, self.ranks.averaged = number, False
        if self.averages and self.plan.accumulation != "accumulate":
            self._begin_averaging()
        if self.averages:
            _compat.after_backward(self._end_backward)

    def _begin_averaging(self) -> None:
        if not self._averager.active:
            roles = self._cache or self._roles_now()
            updated = [p for p, r in roles.items() if r is Role.UPDATE]
            self._averager.begin(updated, self._order)

    def _end_backward(self) -> None:
        if not self._expected:
            self._averager.finish()
        if self.ranks.wrapped and self.ranks.syncs:  # as the wrapper would
            self.average()

    def tell_order(self, first_use: Mapping[nn.Parameter, int]) -> None:
        """First use of each parameter in the captured graph.

        Raises:
            BlockStateError: the graph has parameters that the model did not have.
        """
        if not first_use.keys() <= self.names.keys():
            raise BlockStateError(
                "parameters were replaced after fxmem.transform (sharding does that)",
                advice="make the BlockAdamW of the model as it trains, last",
            )
        if first_use != self._order:
            self._order = dict(first_use)
            self._cache.clear()

    def rule(self, parameter: nn.Parameter) -> Rule | None:
        """As the plan says, where nothing asks for the gradient and one backward makes a step."""
        plan, kind = self.plan, self.plan.inactive
        if self.averages or plan.clip != "none" or plan.accumulation is not None:
            return None
        if not isinstance(kind, (SGD, SignSGD)):
            return None
        name = self.names[parameter]
        bits = key(plan.seed, name, self.step, self._moved.get(name, 0))
        return Rule(kind.lr * self.lr_scale(), isinstance(kind, SignSGD), bits)

    @property
    def active(self) -> frozenset[str]:
        """Names of the parameters that AdamW trains in this step."""
        return self._active(self.step)

    def _active(self, step: int) -> frozenset[str]:
        names = self.blocks[self.schedule.block(step)].names
        return frozenset((*names, *self.parts.always))

    def role(self, parameter: nn.Parameter) -> Role:
        if not self._cache:
            self._cache = self._roles_now()
        found = self._cache.get(parameter)
        return super().role(parameter) if found is None else found

    def _roles_now(self) -> dict[nn.Parameter, Role]:
        """Roles of the forward to come; under ``"last"``, updates wait for the last micro-batch."""
        roles = self.roles_at(self.step)
        last = self.ranks.syncs and self.is_last_micro_batch()
        if self.plan.accumulation == "last" and not last:
            held = [p for p, r in roles.items() if r is Role.UPDATE]
            self._held |= bool(held)
            roles |= dict.fromkeys(held, Role.FROZEN)
        return roles

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
            else:
                roles[p] = Role.UPDATE
        return roles

    def sgd_rate(self, parameter: nn.Parameter) -> float | None:
        plan, kind = self.plan, self.plan.inactive
        if not isinstance(kind, SGD) or self.averages or plan.clip != "none":
            return None
        if plan.accumulation == "accumulate":
            return None
        if parameter.dtype not in (torch.float32, torch.float64):
            return None
        return kind.lr * self.lr_scale() * self._scale()

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.guard.factors(a, b) if self.plan.guard else (a, b)

    def _scale(self) -> float:
        """Of a gradient: under ``"last"`` it stands for all backwards of this step so far."""
        return float(max(1, self._backwards)) if self.plan.accumulation == "last" else 1.0

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
                local(self._kept[parameter]).add_(local(grad))
            else:
                self._kept[parameter] = grad
            return
        if name in self._moved and self.plan.accumulation != "micro":
            raise BlockStateError(f"{name!r} got a second gradient before the optimizer step")
        if self.averages:
            self._averager.put(parameter, grad)
        else:
            self._move(parameter, grad)

    @torch.no_grad()
    def _move(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """The update itself; ``grad`` is the average where there is one."""
        plan, name, scale = self.plan, self.names[parameter], self._scale()
        assert isinstance(plan.inactive, (SGD, SignSGD))
        micro = self._moved.get(name, 0)
        self._moved[name] = micro + 1
        if plan.guard:
            self.guard.check(grad)
            self.guard.select_(local(grad))
        factor = self.clip.factor(grad, scale, sum(r is Role.UPDATE for r in self._cache.values()))
        if plan.guard and self.guard.blocks(grad.device):
            return
        sign, rate = isinstance(plan.inactive, SignSGD), plan.inactive.lr * self.lr_scale()
        if sign and plan.accumulation == "micro":
            rate /= plan.micro_batches or 1
        move(
            local(parameter), local(grad), rate, scale * factor, sign=sign,
            limit=plan.clip_norm if plan.clip == "value" else None,
            bits=key(plan.seed, name, self.step, micro), first=first_element(parameter),
        )  # fmt: skip
        if is_shard(parameter):  # whose local tensor has a version of its own
            torch.autograd.graph.increment_version(parameter)

    def rehearse(self, parameter: nn.Parameter, weight: Tensor, grad: Tensor) -> bool:
        if self.plan.accumulation == "accumulate":
            return True
        clip = self.plan.clip
        scale = grad.new_ones(()) if clip == "per_tensor" else 1.0
        limit = self.plan.clip_norm if clip == "value" else None
        move(weight, grad, 1.0, scale, sign=isinstance(self.plan.inactive, SignSGD), limit=limit)
        return False

    def finish_backwards(self) -> None:
        """Apply what waits for a backward that never ran, and sums over micro-batches.

        Raises:
            BlockStateError: under ``"last"``, no forward of this step was the last one.
        """
        self.flush()
        if self._held and not self._moved:
            raise BlockStateError(
                'accumulation="last", but no forward of this step was said to be the last one',
                advice="set is_last_micro_batch of the model's block state",
            )
        if self.averages and self.plan.accumulation == "accumulate":
            self._begin_averaging()
        for parameter in list(self._kept):
            (self._averager.put if self.averages else self._move)(
                parameter, self._kept.pop(parameter)
            )
        self._averager.finish()

    def advance(self) -> bool:
        """Count one optimizer step; True where it ended a visit."""
        before = self.schedule.visit(self.step)[0]
        self.clip.end_step()
        self.begin(self.step + 1)
        return self.schedule.visit(self.step)[0] != before

    def begin(self, step: int) -> None:
        """Nothing of optimizer step ``step`` has been done yet."""
        self.step = step
        self.guard.clear()
        self._moved.clear()
        self._kept.clear()
        self._averager.clear()
        self._cache.clear()
        self._backwards, self._backward, self._held = 0, -1, False
        self.ranks.averaged = False


__all__ = ["BlockState"]
