"""Train one block at a time with the Hugging Face Trainer, stop, and resume bit for bit.

Run: ``python examples/blocks_with_trainer.py``
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, Plan, Stream

LAYERS, VISIT, STEPS = 2, 2, 6


def build() -> LlamaForCausalLM:
    """A small Llama with random weights; every call gives the same ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainer(model: LlamaForCausalLM, folder: Path) -> Trainer:
    """A Trainer with accumulation over two micro-batches, clipping and a cosine schedule."""
    blocks = Blocks(steps=VISIT, inactive=SGD(lr=0.05), accumulation="accumulate")
    fxmem.transform(model, Plan(stream=Stream(chunk=16, loss_chunk=16), blocks=blocks))
    optimizer = BlockAdamW(model, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_grad_norm=1.0, save_steps=3, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    ids = torch.randint(0, 64, (32, 24), generator=torch.Generator().manual_seed(1))
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = [p.detach().clone() for p in build().parameters()]
        whole = build()
        trainer(whole, folder).train()
        resumed = build()
        trainer(resumed, folder).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        same = all(
            torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
        )
        assert same, "a resumed run ends elsewhere"
        layers = [p for n, p in whole.named_parameters() if "layers" in n]
        moved = {id(p) for p, old in zip(whole.parameters(), before, strict=True)
                 if not torch.equal(p, old)}  # fmt: skip
        assert all(id(p) in moved for p in layers), "a layer has not moved"
        print(f"{STEPS} steps, all {LAYERS} layers moved; resumed from step 3: equal bit for bit")


if __name__ == "__main__":
    main()
