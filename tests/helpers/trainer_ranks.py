"""Transformers' Trainer on one rank of torchrun or alone: evaluates, saves, and goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from blocks_cases import STREAM, Small, ids, small
from torch import Tensor

import fxmem
from fxmem import SGD, BlockAdamWFactory, Blocks, Plan

STEPS, EVERY = 4, 2
PLANS: dict[str, Plan | None] = {
    "plain": None,
    "stream": Plan(stream=STREAM),
    "blocks": Plan(stream=STREAM, blocks=Blocks(steps=1, inactive=SGD(0.01), reach="all")),
    "accumulated": Plan(
        stream=STREAM, blocks=Blocks(steps=1, inactive=SGD(0.01), accumulation="accumulate")
    ),
}


class Named(Small):
    """As the Trainer calls models: all in float64, to which those of transformers do not keep."""

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return {"loss": super().forward(ids)}


def train(kind: str, folder: Path, *, resume: bool = False) -> dict[str, Tensor]:
    """Weights at the end. One process takes the rows that two ranks would share."""
    plan, world = PLANS[kind], int(os.environ.get("WORLD_SIZE", "1"))
    rows = [{"ids": row, "labels": row} for row in ids(1, 16, 37)]
    arguments = tf.TrainingArguments(
        str(folder / kind), per_device_train_batch_size=2 // world, max_steps=STEPS,
        learning_rate=1e-2, save_steps=EVERY, eval_strategy="steps", eval_steps=EVERY,
        report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True,
        gradient_accumulation_steps=2 if kind == "accumulated" else 1,
    )  # fmt: skip
    given: dict[str, Any] = {}
    if plan is not None:
        given["callbacks"] = [fxmem.TrainerCallback(plan)]
        if plan.blocks is not None:
            given["optimizer_cls_and_kwargs"] = (BlockAdamWFactory, {"lr": 1e-2})
    model = Named().double()
    model.load_state_dict(small().state_dict())
    trainer = tf.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3], **given
    )
    trainer.train(resume_from_checkpoint=str(folder / kind / f"checkpoint-{EVERY}")
                  if resume else None)  # fmt: skip
    assert trainer.state.global_step == STEPS
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def run_rank(rank: int, port: int, out: str) -> None:
    """Every kind, from the start and from the first checkpoint."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ends = {k: [train(k, Path(out), resume=r) for r in (False, True)] for k in PLANS}
    torch.save(ends, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()
