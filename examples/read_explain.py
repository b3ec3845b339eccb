"""What fxmem does with a model: regions, loops, barriers, bytes, and the programs as Python.

Run: ``python examples/read_explain.py``
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem

LAYERS = 6


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=64, loss_chunk=64)))
    ids_BT = torch.randint(512, (1, 500))
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()

    report = fxmem.explain(model)
    print(report)

    # Nothing ran whole, and layers of equal structure share one program.
    assert not report.barriers
    assert len(report.regions) < LAYERS


if __name__ == "__main__":
    main()
