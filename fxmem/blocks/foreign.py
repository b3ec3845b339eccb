"""Other optimizers than BlockAdamW would train the first block for ever: they are refused."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxmem.blocks.attach import states
from fxmem.errors import BlockStateError
from fxmem.roles.roles import RoleTable

ADVICE = "train with optimizer = fxmem.BlockAdamW(model), or transform the model without Blocks"


@functools.cache
def watch() -> None:
    """From now on look at every optimizer before its step."""
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    if isinstance(getattr(optimizer, "blocks", None), RoleTable):
        return  # a BlockAdamW checks for itself that it is the model's
    for state in states():
        if any(
            p in state.names and p.requires_grad
            for group in optimizer.param_groups
            for p in group["params"]
        ):
            raise BlockStateError(
                f"{type(optimizer).__name__} steps a model with Plan(blocks=...): it would train "
                "the active block only, and never go on to the next one",
                advice=ADVICE,
            )


__all__ = ["ADVICE", "watch"]
