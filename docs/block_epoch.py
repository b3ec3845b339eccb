"""Draw ``docs/block_epoch.png``: a block-epoch of BREAD-SGD on a model of SmolLM2-135M's shape.

Run: ``python docs/block_epoch.py`` (one training step with random weights, about 20 s on a CPU).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, Plan, Stream

CONFIG = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, use_cache=False,
)  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).train()
    blocks = Blocks(order="ascending", steps=50, inactive=SGD(lr=1e-3))
    fxmem.transform(model, Plan(stream=Stream(), blocks=blocks))
    optimizer = BlockAdamW(model)
    ids = torch.randint(CONFIG.vocab_size, (1, 1024))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    epoch = fxmem.explain(model).blocks
    assert epoch is not None
    path = Path(__file__).with_name("block_epoch.png")
    epoch.draw(path)
    print(path)


if __name__ == "__main__":
    main()
