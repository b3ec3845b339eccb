"""Ranks whose inputs take other ways than those of their peers: one token, no labels."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from blocks_sharded import values
from sharded import WAYS, counted, inputs
from torch import Tensor

from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, Stream, transform
from fxmem.blocks.attach import state_of

FIRST = "model.layers.0"
PARTS: dict[str, Any] = {
    "partition": ((f"{FIRST}.mlp",), ("model.layers.1", "model.embed_tokens")),
    "frozen": (
        f"{FIRST}.self_attn", f"{FIRST}.input_layernorm", f"{FIRST}.post_attention_layernorm",
        "lm_head",
    ),
    "always_active": ("model.norm",), "inactive": None,
}  # fmt: skip
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("layers", {"inactive": SGD(0.1), "reach": "all"}),
    "parts": ("accelerate", PARTS),
    "low rank": ("head", {"inactive": LowRank(rank=2), "always_active": ("model.norm",)}),
}
"""With a way to shard; blocks of the second are parts of a group."""


def batches(rank: int) -> list[dict[str, Tensor]]:
    """Of rank 1: like others; one token; one token with a label, of two sequences; no labels."""
    given = [inputs(rank, step) for step in range(5)]
    if rank:
        for batch, rows in zip(given[1:3], (1, 2), strict=True):
            batch.update({k: v[:rows, :1] for k, v in batch.items()})
            del batch["attention_mask"]
        del given[1]["labels"], given[3]["labels"]
    return given


def loss_of(net: Any, batch: dict[str, Tensor]) -> Tensor:
    """Outside the model where there are no labels; inside, of any number of them."""
    if "labels" not in batch:
        return net(**batch).logits.square().mean()  # type: ignore[no-any-return]
    return net(**batch, num_items_in_batch=50).loss  # type: ignore[no-any-return]


def trained(rank: int, world: int, name: str) -> tuple[list[Tensor], list[dict[str, int]]]:
    """Weights and terms after a step of every kind, and what each sent."""
    way, plan = PLANS[name]
    net: Any = tiny.model("llama").double()
    if world > 1:
        WAYS[way](net)
    transform(net, Plan(stream=Stream(chunk=9), blocks=Blocks(steps=1, **plan)))
    optimizer, sent = BlockAdamW(net, lr=1e-2), []
    ranks = [rank] if world > 1 else [0, 1]
    for step in range(5):
        with counted() as collectives:
            torch.stack([loss_of(net, batches(r)[step]) for r in ranks]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        sent.append(dict(collectives))
    return values(net, state_of(net)), sent


def on_a_rank(rank: int, name: str) -> tuple[list[Tensor], list[dict[str, int]]]:
    return trained(rank, 2, name)
