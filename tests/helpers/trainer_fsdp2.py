"""transformers' Trainer with its own FSDP2 options and ``Plan(blocks=...)``, as a rank of torchrun.

As in ``accelerated.py``, accelerate is told that its processes are those of several devices.
"""

from __future__ import annotations

import os
from typing import Any

import tiny
import torch
import transformers as tf
from accelerate import PartialState
from accelerate.utils import DistributedType
from double import everything_in_double
from sharded import state
from torch import Tensor

import fxmem

STEPS, PARTS = 3, 2
FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
WAYS = {"accumulate": "callback", "last": "before"}
"""Policies of accumulation; the model is transformed by the callback, or before."""


def rows() -> list[dict[str, Tensor]]:
    ids = tiny.batch(2 * PARTS * STEPS, 21)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(folder: str, world: int, policy: str) -> dict[str, Tensor]:
    """Weights after three blocks of one clipped step of two micro-batches."""
    model: Any = tiny.model().double()
    blocks = fxmem.Blocks(
        inactive=fxmem.SGD(0.1), reach="all", steps=1, accumulation=policy, order="ascending"
    )  # type: ignore[arg-type]
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=9), blocks=blocks)
    by_callback = WAYS[policy] == "callback"
    if not by_callback:
        fxmem.transform(model, plan)
    arguments = tf.TrainingArguments(
        folder, per_device_train_batch_size=2 // world, gradient_accumulation_steps=PARTS,
        max_steps=STEPS, learning_rate=1e-2, save_strategy="no", report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential",
        **(FSDP if world > 1 else {}),
    )  # fmt: skip
    assert arguments.device.type == "cpu"  # which makes the state
    if world > 1:
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer = tf.Trainer(
        model, arguments, train_dataset=rows(),  # type: ignore[arg-type]
        callbacks=[fxmem.TrainerCallback(plan)] if by_callback else [],
        optimizer_cls_and_kwargs=(fxmem.BlockAdamWFactory, {"lr": 1e-2}),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    kinds = {type(p).__name__ for p in model.parameters()}
    assert kinds == ({"DTensor"} if world > 1 else {"Parameter"}), kinds
    return {n: v for n, v in state(model).items() if not n.endswith(".grad")}


def run(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with everything_in_double():
        found = {policy: trained(out, 2, policy) for policy in WAYS}
    torch.save(found, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()
