"""What trains: the parameters that learn and the bytes of optimizer states, without weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxmem._compat.graph import FakeTensorMode
from fxmem.blocks.partition import build
from fxmem.errors import PlanError
from fxmem.memory.block_formula import STATE_VALUES
from fxmem.optional import require
from fxmem.plan.blocks import Blocks
from fxmem.planning.weightless import without_weights

OPTIMIZERS = ("adamw", "adamw8bit", "sgd", "blocks", "lora")


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to train a model.

    Attributes:
        name: one of :data:`OPTIMIZERS`.
        model: the model, its tensors without memory; what requires a gradient learns.
        weights: bytes of parameters and buffers.
        state: bytes of the optimizer, and of gradients that wait for it elsewhere.
        blocks: the plan's blocks, where one block trains at a time.
    """

    name: str
    model: nn.Module
    weights: int
    state: int
    blocks: Blocks | None = None


def mode_of(name: str, model: nn.Module, rank: int) -> Mode:
    """``model`` is a model without weights; it stays as it is.

    ``adamw`` is ``torch.optim.AdamW(fused=True)``, with moments in the parameters' type;
    ``adamw8bit`` quantises them in blocks of 256 (as bitsandbytes does); ``blocks`` is
    `fxmem.BlockAdamW` on the first layer, the dearest; ``lora`` is AdamW on adapters of this rank
    beside every linear layer (PEFT).

    Raises:
        PlanError: another name, or the model does not take it.
    """
    twin = without_weights(model)
    blocks, extra = None, 0
    if name == "lora":
        twin = _adapted(twin, rank)
    elif name == "blocks":
        blocks = Blocks()
        parts = build(twin, blocks)
        learning = {*parts.blocks[0].names, *parts.always}
        for n, p in twin.named_parameters():
            p.requires_grad_(n in learning)
        largest = max(parts.blocks, key=lambda b: _count(twin, b.names))
        extra = _block_state(twin, (*largest.names, *parts.always))
    elif name not in OPTIMIZERS:
        raise PlanError(f"optimizer is {name!r}", advice=f"one of {', '.join(OPTIMIZERS)}")
    learns = [p for p in twin.parameters() if p.requires_grad]
    if not learns:
        raise PlanError(f"no parameter of {type(model).__name__} requires a gradient")
    state = extra if name == "blocks" else _state(name, learns)
    tensors = {id(t): t.nbytes for t in (*twin.parameters(), *twin.buffers())}
    return Mode(name, twin, sum(tensors.values()), state, blocks)


def _count(model: nn.Module, names: Iterable[str]) -> int:
    wanted = set(names)
    return sum(p.numel() for n, p in model.named_parameters() if n in wanted)


def _block_state(model: nn.Module, names: Iterable[str]) -> int:
    """Two moments in float32; of narrower weights also a master and a gradient in float32."""
    narrow = next(model.parameters()).dtype.itemsize < 4
    return _count(model, names) * 4 * (STATE_VALUES if narrow else STATE_VALUES - 2)


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    peft = require("peft")
    if rank < 1:
        raise PlanError(f"rank is {rank}", advice="give at least 1")
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for old names of transformers
        adapted: nn.Module = peft.get_peft_model(model, config)
    return without_weights(adapted)


def _state(name: str, parameters: list[nn.Parameter]) -> int:
    if name == "adamw8bit":
        # two bytes and a scale per 256 each; tensors under 4096 elements keep float32
        return sum(
            2 * (n + 4 * math.ceil(n / 256)) if n >= 4096 else 8 * n
            for n in (p.numel() for p in parameters)
        )
    with FakeTensorMode():
        fake = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in parameters]
        for p in fake:
            p.grad = torch.empty_like(p)
        kind: Any = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
        optimizer = kind(fake, lr=1e-4, foreach=False)
        optimizer.step()
        return sum(
            value.nbytes for state in optimizer.state.values() for value in state.values()
            if isinstance(value, torch.Tensor)
        )  # fmt: skip
