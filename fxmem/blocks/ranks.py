"""The ranks that average what a step takes; inside DistributedDataParallel, in its place.

The wrapper would average gradients when the whole backward has run, which is too late for updates
inside it, and it would keep a bucket for every parameter, which is what blocks save.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxmem._compat import ddp
from fxmem.blocks.attach import has_state
from fxmem.blocks.policies import average_gradients, mean_over_processes, world_size
from fxmem.blocks.shards import is_shard
from fxmem.distributed.agreement import agree
from fxmem.errors import RoleError


class Ranks:
    """Of one model.

    Attributes:
        group: the ranks; None stands for all.
        wrapped: it has run inside DistributedDataParallel.
        syncs: the latest forward was not inside ``no_sync``.
        averaged: nothing has run with gradients since the latest average of this step.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.wrapped, self.syncs, self.averaged = False, True, False
        self._agreed = False

    def enter(self, wrapper: Any, model: nn.Module) -> bool:
        """A forward of the model begins, in a wrapper or None; True if the group is another one.

        Raises:
            RoleError: the wrapper does what blocks cannot do in its place.
        """
        self.syncs, self.averaged = wrapper is None or ddp.syncs(wrapper), False
        if wrapper is None:
            return False
        before, self.group = self.group, _take_over(wrapper, model)
        self.wrapped = True
        return self.group is not before

    def agree(self, facts: Mapping[str, int], device: torch.device) -> None:
        """Compare them, once.

        Raises:
            DivergedError: they differ.
        """
        if not self._agreed and world_size(self.group) > 1:
            agree(facts, [self.group], device)
            self._agreed = True

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Make their gradients means over the ranks, where they are not."""
        if not self.averaged:
            average_gradients(parameters, partial(mean_over_processes, group=self.group))
            self.averaged = True


def _take_over(wrapper: Any, model: nn.Module) -> dist.ProcessGroup:
    """The ranks over which to average what `wrapper`, whose forward runs now, averages no more.

    Raises:
        RoleError: it holds more than the model, or was asked for what only it can do.
    """
    if wrapper.module is not model:
        raise RoleError(
            f"DistributedDataParallel wraps {type(wrapper.module).__name__}, of which the model "
            "with Plan(blocks=...) is a part: its other gradients are not averaged by blocks",
            advice="transform what is wrapped, or wrap what is transformed",
        )
    if any(is_shard(p) for p in model.parameters()):
        raise RoleError(
            "DistributedDataParallel is around parameters that fully_shard has spread, and blocks "
            "average over one of them",
            advice="give fully_shard a mesh of two dimensions (HSDP), and leave the wrapper out",
        )
    if (option := ddp.options_in_the_way(wrapper)) is not None:
        raise RoleError(
            f"DistributedDataParallel has {option}, which works on its buckets; a model with "
            "Plan(blocks=...) averages its gradients without them",
            advice=f"wrap it without {option}",
        )
    alive = weakref.ref(model)

    def check() -> None:
        if (now := alive()) is not None and not has_state(now):
            raise RoleError(
                "Plan(blocks=...) was taken from the model, and DistributedDataParallel around it "
                "does not average any more",
                advice="wrap the model anew",
            )

    ddp.disarm(wrapper, check, _refused)
    group: dist.ProcessGroup = wrapper.process_group
    return group


def _refused(name: str) -> RoleError:
    return RoleError(
        f"DistributedDataParallel has no buckets (asked for `{name.lstrip('_')}`): blocks average "
        "their gradients themselves",
        advice="wrap the model without hooks on its communication, and do not use join()",
    )


__all__ = ["Ranks"]
