"""How often a whole training script captures its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from torch import Tensor

import fxmem
from fxmem import Plan, Stream
from fxmem.runtime.counters import COUNTER

LENGTHS = (23, 40, 31, 17, 29, 36)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded to the longest; without a mask where nothing is padded."""
    longest = max(len(r["input_ids"]) for r in rows)
    ids = [r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows]
    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    labels = [[i if m else -100 for i, m in zip(a, b, strict=True)]
              for a, b in zip(ids, mask, strict=True)]  # fmt: skip
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    full = all(map(all, mask))
    return batch if full else {**batch, "attention_mask": torch.tensor(mask)}


def rows() -> list[dict[str, Any]]:
    """In pairs: of one length, and of two."""
    pairs = [(n, n - (i % 2) * 5) for i, n in enumerate(LENGTHS)]
    return [{"input_ids": tiny.batch(1, n)["input_ids"][0].tolist()} for p in pairs for n in p]


@pytest.mark.field
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_six_lengths_with_and_without_a_mask_and_evaluation_between(tmp_path: Path) -> None:
    """One for training and one for evaluation, each with a mask and without one."""
    model = fxmem.transform(tiny.model(use_cache=False), Plan(stream=Stream(chunk=8)))
    args = tf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=12,
        eval_strategy="steps", eval_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = tf.Trainer(
        model=model, args=args, train_dataset=rows(), eval_dataset=rows(), data_collator=collate
    )
    before = COUNTER.captures
    trainer.train()
    assert 2 <= COUNTER.captures - before <= 4
    assert fxmem.explain(model).executed_bodies > 0
    kinds = {"attention_mask" in collate(rows()[i : i + 2]) for i in range(0, 12, 2)}
    assert kinds == {True, False}
    assert any("eval_loss" in log for log in trainer.state.log_history)
