"""A Trainer makes the block optimizer of the model that its callback transforms."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
import transformers

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, Plan, Stream


def test_the_trainer_makes_the_optimizer(tmp_path: Path) -> None:
    model = tiny.model()
    plan = Plan(
        stream=Stream(chunk=16), blocks=Blocks(steps=1, order="ascending", inactive=SGD(1e-3))
    )
    ids = torch.randint(0, tiny.VOCAB, (8, 12))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ids],  # type: ignore[arg-type]
        callbacks=[fxmem.TrainerCallback(plan)],
        optimizer_cls_and_kwargs=(fxmem.BlockAdamWFactory, {"lr": 1e-2}),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    made = trainer.optimizer.optimizer  # type: ignore[union-attr]
    assert isinstance(made, BlockAdamW) and made.blocks.step == 2
    moved = {
        n for n, p in model.named_parameters() if float((p - before[n]).detach().abs().max()) > 5e-3
    }
    assert {n.split(".")[2] for n in moved if "layers" in n} == {"0", "1"}, "both were active"
