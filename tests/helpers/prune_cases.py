"""Tiny models of every architecture that pruning is tested on."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as T
from torch import nn

import fxmem

BASE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=40, intermediate_size=72, num_hidden_layers=2,
    num_attention_heads=10, num_key_value_heads=5, head_dim=4, initializer_range=0.5,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, {}),
    "llama_mha_tied": (
        T.LlamaConfig, T.LlamaForCausalLM, {"num_key_value_heads": 10, "tie_word_embeddings": True},
    ),
    "qwen2": (T.Qwen2Config, T.Qwen2ForCausalLM, {"head_dim": None}),
    "qwen3": (T.Qwen3Config, T.Qwen3ForCausalLM, {}),
    "gemma": (T.GemmaConfig, T.GemmaForCausalLM, {}),
    "gemma2": (T.Gemma2Config, T.Gemma2ForCausalLM, {}),
    "phi3": (T.Phi3Config, T.Phi3ForCausalLM, {"head_dim": None}),
    "gpt2": (
        T.GPT2Config, T.GPT2LMHeadModel,
        {
            "n_inner": 72, "num_attention_heads": 5, "intermediate_size": None,
            "num_key_value_heads": None, "head_dim": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "opt": (
        T.OPTConfig, T.OPTForCausalLM,
        {
            "ffn_dim": 72, "num_attention_heads": 5, "init_std": 0.5, "word_embed_proj_dim": 40,
            "dropout": 0.0, "intermediate_size": None, "num_key_value_heads": None,
            "head_dim": None, "initializer_range": None,
        },
    ),
    "mixtral": (
        T.MixtralConfig, T.MixtralForCausalLM, {"num_local_experts": 4, "intermediate_size": 64},
    ),
    "qwen3_moe": (
        T.Qwen3MoeConfig, T.Qwen3MoeForCausalLM,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}  # fmt: skip


def build(name: str, attention: str = "sdpa") -> nn.Module:
    """The model in float64, evaluation mode; biases are not zero."""
    config, cls, extra = CASES[name]
    values = {k: v for k, v in {**BASE, **extra}.items() if v is not None}
    torch.manual_seed(0)
    made = config(attn_implementation=attention, experts_implementation="eager", **values)
    model: nn.Module = cls(made).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(0, 0.5)
    return model


@functools.cache
def coupled(name: str, attention: str = "sdpa") -> fxmem.Coupling:
    """Of every model that :func:`build` makes of this name: to read it takes longer than a test."""
    return fxmem.coupling(build(name, attention))
