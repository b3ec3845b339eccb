"""A materialised sub-model equals the masked model."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem


def test_masked_equals_sliced() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=40, intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=10, num_key_value_heads=5, head_dim=4, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    units = fxmem.coupling(model)
    assert [(g.kind, g.size, g.cost) for g in units.groups] == [
        ("kv_groups", 5, 960), ("mlp_channels", 72, 120),
    ] * 2  # fmt: skip
    bools = {g.name: torch.rand(g.size) < 0.6 for g in units.groups}
    masks = fxmem.Masks.from_bools(units, bools)
    small = fxmem.materialize(model, masks, units)
    ids = torch.randint(0, 97, (3, 11))
    with torch.no_grad(), fxmem.masked(model, masks, units):
        want = model(input_ids=ids).logits
    with torch.no_grad():
        got = small(input_ids=ids).logits
        assert (model(input_ids=ids).logits - want).abs().max() > 1e-3
    assert (got - want).abs().max() < 1e-10
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
