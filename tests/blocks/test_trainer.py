"""The Hugging Face Trainer with block training against a loop written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD, Stream
from fxmem.blocks.attach import state_of

STEPS, WINDOW = 5, 2
POLICIES: dict[str, dict[str, Any]] = {
    "last": {"inactive": SGD(0.05), "accumulation": "last"},
    "accumulate": {"inactive": SGD(0.05), "accumulation": "accumulate"},
    "micro": {"inactive": SignSGD(1e-3), "accumulation": "micro", "micro_batches": WINDOW},
    "low_rank": {"inactive": LowRank(rank=2)},
}


def start(policy: str) -> tuple[Any, BlockAdamW, Any]:
    net = tiny.model("llama", use_cache=False)
    blocks = Blocks(steps=2, order="ascending", reach="all", **POLICIES[policy])
    fxmem.transform(net, Plan(stream=Stream(chunk=8, loss_chunk=8), blocks=blocks))
    opt = BlockAdamW(net, lr=1e-2)
    return net, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)


@pytest.mark.parametrize(
    "policy", [p if p == "last" else pytest.param(p, marks=pytest.mark.slow) for p in POLICIES]
)
def test_a_trainer_with_accumulation_is_the_loop(policy: str, tmp_path: Path) -> None:
    """Two micro-batches per step, clipping and a cosine schedule; the window at the end of the data
    has one micro-batch alone. The Trainer tells which micro-batch is the last.
    """
    gen = torch.Generator().manual_seed(1)
    rows = torch.randint(0, tiny.VOCAB, (10, 12), generator=gen)
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    net, opt, schedule = start(policy)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=WINDOW, max_grad_norm=1.0, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, logging_steps=100, train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(net, arguments, train_dataset=data, optimizers=(opt, schedule)).train()

    other, opt, schedule = start(policy)
    state = state_of(other)
    batches = [rows[i : i + 2] for i in range(0, 10, 2)]
    epoch = [batches[0:2], batches[2:4], batches[4:5]]
    for step in range(STEPS):
        window = epoch[step % 3]
        for batch in window:
            state.is_last_micro_batch = lambda last=batch is window[-1]: last
            (other(input_ids=batch, labels=batch).loss / len(window)).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        opt.step()
        schedule.step()
        other.zero_grad()
    assert state.step == state_of(net).step == STEPS
    for (n, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=n)
    for n, term in state.adapters.items():
        got = state_of(net).adapters[n]
        torch.testing.assert_close(got.up, term.up, rtol=1e-3, atol=1e-6)
    moved = [n for n, p in tiny.model("llama", use_cache=False).named_parameters()
             if not torch.equal(p, dict(net.named_parameters())[n])]  # fmt: skip
    assert {n.split(".")[2] for n in moved if "layers" in n} == {"0", "1"}
