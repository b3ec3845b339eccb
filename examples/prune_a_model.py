"""Prune a model: search which heads and channels stay, then slice a really smaller one.

Run: ``python examples/prune_a_model.py``
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem.demo.text import long_text

LENGTH, BATCH = 64, 8


def build() -> LlamaForCausalLM:
    """A byte-level Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=256, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def text_batches() -> list[dict[str, torch.Tensor]]:
    """Python's own reference topics as byte sequences."""
    data = torch.tensor(list(long_text().encode("ascii", "ignore")))
    rows = data[: len(data) // (LENGTH * BATCH) * LENGTH * BATCH].view(-1, BATCH, LENGTH)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def train(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> None:
    """A few steps: enough for some units to matter more than others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loss(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss per token."""
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def main() -> None:
    batches = text_batches()
    calibration, held_out = batches[100:140], batches[200:204]
    model = build()
    train(model, batches[:100])
    model.eval()

    # Only sub-models run, and each serves many steps.
    options = fxmem.Prune(keep=0.5, steps=40)
    masks = fxmem.search(model, calibration, options)
    small = fxmem.materialize(model, masks)
    at_random = fxmem.score(model, calibration, "random", options)[1]

    print(f"parameters  {model.num_parameters():,} -> {small.num_parameters():,}")
    print(f"held-out loss: dense {loss(model, held_out):.3f}, searched", end=" ")
    found, chance = (loss(m, held_out) for m in (small, fxmem.materialize(model, at_random)))
    print(f"{found:.3f}, random {chance:.3f}")
    assert small.num_parameters() < 0.75 * model.num_parameters()
    assert found < chance


if __name__ == "__main__":
    main()
