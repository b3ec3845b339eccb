"""Wrappers around a model, and what needs it bare: it reads whole weights, as pruning does."""

from __future__ import annotations

from torch import nn

from fxmem._compat import fsdp as _compat
from fxmem.errors import PlanError

GATHERED = "prune before the model is sharded, or build it again and load the full state_dict"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that streams: of a DistributedDataParallel the one inside."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inside: nn.Module = model.module
        return inside
    return model


def check_whole(model: nn.Module) -> None:
    """Refuse wrappers, and parameters of which other ranks have parts.

    Raises:
        PlanError: names what is in the way.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise PlanError(
            f"the model is wrapped by {type(model).__name__}, and pruning reads its modules",
            advice="give the model inside, its .module; ranks share the work by group=",
        )
    if (name := _compat.dtensor_parameter(model) or _compat.zero3_parameter(model)) is not None:
        raise PlanError(f"this rank has a part of parameter `{name}` only", advice=GATHERED)
    if (name := _compat.fsdp1_module(model)) is not None:
        raise PlanError(
            f"`{name or type(model).__name__}` is wrapped by FullyShardedDataParallel",
            advice=GATHERED,
        )


__all__ = ["check_whole", "unwrapped"]
