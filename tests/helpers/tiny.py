"""Tiny random models and batches shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 50
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**_GROUPED),
    "qwen2": lambda: tf.Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
    "mistral-5": lambda: tf.MistralConfig(**_GROUPED, sliding_window=5),
    "mistral-7": lambda: tf.MistralConfig(**_GROUPED, sliding_window=7),
    "mistral-12": lambda: tf.MistralConfig(**_GROUPED, sliding_window=12),
    "phi3": lambda: tf.Phi3Config(**_GROUPED, pad_token_id=0),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SHAPE, intermediate_size=48),
    "opt": lambda: tf.OPTConfig(**_SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "olmo2": lambda: tf.Olmo2Config(**_GROUPED),
    "mixtral": lambda: tf.MixtralConfig(**_GROUPED, **_MOE, num_local_experts=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_GROUPED, **_MOE, head_dim=8, num_experts=4, moe_intermediate_size=16
    ),
}  # fmt: skip


def model(name: str = "llama", *, default_experts: bool = False, **changes: Any) -> nn.Module:
    """A randomly initialised model in train mode, norms and biases included.

    ``default_experts``: experts run as transformers chooses, which has no float64.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if default_experts:
        config._experts_implementation = None
    for key, value in changes.items():
        setattr(config, key, value)
    net = tf.AutoModelForCausalLM.from_config(config).train()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return net  # type: ignore[no-any-return]


def batch(size: int = 2, length: int = 23, padding: str | None = None) -> dict[str, Tensor]:
    """Ids and labels (the prompt of row 0 masked), padded ``left``, ``right`` or ``mixed``."""
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (size, length))
    labels = ids.clone()
    labels[0, :4] = -100
    out = {"input_ids": ids, "labels": labels}
    if padding is not None:
        mask = torch.ones_like(ids)
        if padding in ("left", "mixed"):
            mask[0, :5] = 0
        if padding in ("right", "mixed"):
            mask[-1, -6:] = 0
        labels[mask == 0] = -100
        out["attention_mask"] = mask
    return out


def packed(length: int = 23, first: int = 9) -> dict[str, Tensor]:
    """Two documents in one row, told apart by position ids that start again."""
    out = batch(1, length)
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])
    return {**out, "position_ids": positions.unsqueeze(0)}


def step(net: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step from zero."""
    net.zero_grad()
    loss = net(**inputs).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
