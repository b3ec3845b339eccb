"""What reads whole weights module by module, as pruning does, needs the bare model."""

from __future__ import annotations

from torch import nn

from fxmem._compat import fsdp as _compat
from fxmem.errors import PlanError

GATHERED = "prune before the model is sharded, or build it again and load the full state_dict"


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


__all__ = ["check_whole"]
