"""Steps under DeepSpeed's engine on one rank, as its users write them."""

from __future__ import annotations

import os
import warnings
from typing import Any

import tiny
import torch
from data_parallel import LENGTHS
from torch import Tensor

import fxmem

PLAN = fxmem.Plan(stream=fxmem.Stream(chunk=9))
STAGES: dict[str, dict[str, Any]] = {
    "none": {"stage": 0}, "1": {"stage": 1}, "2": {"stage": 2},
    "2, without overlap": {"stage": 2, "overlap_comm": False, "contiguous_gradients": False},
}  # fmt: skip


def _engine(model: Any, zero: dict[str, Any], optimizer: Any = None) -> Any:
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False)
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5, "zero_optimization": zero, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )[0]


def _weights(rank: int, name: str, zero: dict[str, Any], when: str) -> dict[str, Tensor]:
    """After three steps of two micro-batches; the transform comes when it says, or never."""
    model = tiny.model(name)
    if when == "before":
        fxmem.transform(model, PLAN)
    engine = _engine(model, zero)
    if when == "after":
        fxmem.transform(model, PLAN)
    for part in range(6):
        batch = tiny.batch(2, LENGTHS[(rank + part) % 2], padding=("left", "mixed")[rank])
        engine.backward(engine(**batch).loss)
        engine.step()
    if when != "never":
        assert fxmem.explain(model).executed_bodies > 0
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def steps(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """Weights of plain and of both orders, by stage; nothing is captured in parts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxmem.FxmemWarning)
        for stage, zero in STAGES.items():
            name = "qwen2" if stage == "2" else "llama"
            found[stage] = [_weights(rank, name, zero, w) for w in ("never", "before", "after")]
    return found


def refused(rank: int) -> list[str]:
    """What ZeRO-3 is told, and blocks that ZeRO-1 has flattened."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    messages = []
    for when in ("before", "after"):
        try:
            _weights(rank, "llama", {"stage": 3}, when)
        except fxmem.PlanError as error:
            messages.append(str(error))
    blocks = tiny.model()
    fxmem.transform(blocks, fxmem.Plan(blocks=fxmem.Blocks(average=True)))
    try:
        _engine(blocks, STAGES["1"], fxmem.BlockAdamW(blocks))(**tiny.batch(2, 9))
    except fxmem.FxmemError as error:
        messages.append(str(error))
    return messages
