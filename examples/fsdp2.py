"""Stream under FSDP2: ``fully_shard`` as always, one line more, the same collectives.

Run: ``torchrun --nproc_per_node 2 examples/fsdp2.py``; by itself it starts two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem

LENGTHS = (300, 512)
"""Tokens of each rank: their numbers of chunks may differ."""


def build() -> LlamaForCausalLM:
    """A Llama with random weights, sharded by layer; every call gives the same ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=4096, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def train(model: LlamaForCausalLM, ids: torch.Tensor) -> list[float]:
    """Three steps; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__]
        sys.exit(subprocess.run(command).returncode)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(4096, (1, LENGTHS[rank % 2]), generator=generator)

    plain = train(build(), ids)
    model = build()
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=64)))
    streamed = train(model, ids)

    print(f"rank {rank}: plain {plain}, streamed {streamed}", flush=True)
    assert fxmem.explain(model).executed_bodies > 0
    assert all(abs(a - b) < 1e-4 for a, b in zip(plain, streamed, strict=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
