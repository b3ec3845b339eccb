"""Tiny random causal language models of transformers, by model type."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, IMAGE = 50, 32
_NAMES: dict[int, tuple[str, ...]] = {
    VOCAB: ("vocab_size",),
    32: ("hidden_size", "d_model", "n_embd", "embedding_dim", "attention_hidden_size", "lru_width",
         "image_size", "projection_dim", "embed_dim", "out_hidden_size", "text_hidden_size",
         "audio_hidden_size", "decoder_hidden_size", "codebook_dim"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_blocks", "decoder_layers",
        "encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_key_value_heads",
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts",
        "linear_num_key_heads", "expand", "mamba_expand"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads",
        "mamba_num_heads", "mamba_dt_rank", "time_step_rank", "linear_num_value_heads",
        "linear_num_heads", "conv_kernel"),
    8: ("head_dim", "sliding_window", "attention_window_size", "mamba_d_state", "state_size",
        "ssm_state_size", "mamba_chunk_size", "chunk_size", "q_lora_rank", "kv_lora_rank",
         "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "v_head_dim",
         "linear_key_head_dim", "linear_value_head_dim",
        "linear_head_dim", "index_head_dim", "laurel_rank", "hidden_size_per_layer_input",
        "kv_channels", "patch_size", "d_kv"),
    16: ("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head",
         "mamba_head_dim", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    48: ("intermediate_size", "d_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"),
    128: ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"),
    1: ("bos_token_id", "decoder_start_token_id", "mamba_n_groups", "n_groups", "n_group",
        "topk_group", "n_shared_experts", "num_nextn_predict_layers"),
    0: ("pad_token_id", "eos_token_id"),
}  # fmt: skip
"""The size of everything that a configuration may have."""
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    # one block a stage: with all 55, rounding of the input grows a million times in plain PyTorch
    "efficientnet": {"depth_coefficient": 0.25, "width_coefficient": 0.25, "hidden_dim": 320},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
        "num_kv_shared_layers": 1, "vocab_size_per_layer_input": VOCAB,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": _LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {**_LINEAR, "num_key_value_heads": 4, "q_lora_rank": None,
                    "mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"],
                   "num_hidden_layers": 3},
    "mamba2": {"head_dim": 16},
    "mobilebert": {"embedding_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"num_hidden_layers": 2, "hidden_size": 64, "embedding_dim": 64,
              "qk_dim_factor": 1.0, "use_cache": False},
    "zamba": {
        "num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
        "num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 4, "attention_hidden_size": 64, "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
EVALUATED = ("phimoe",)
"""Their router draws random numbers in training."""
ISSUE = (
    "bamba", "bloom", "falcon_mamba", "gemma3n_text", "granitemoehybrid", "hy_v4", "jamba",
    "jetmoe", "kimi_linear", "lfm3", "mamba", "minimax", "mpt", "nemotron_h", "olmo_hybrid",
    "phimoe", "prophetnet", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
    "rwkv", "xlnet", "xlstm",
)  # fmt: skip
"""Types that once ended in an error of another kind than fxmem's own."""


def config(name: str) -> Any:
    """A small configuration without dropout or noise; experts run one by one: float64 needs it."""
    made = _small(tf.AutoConfig.for_model(name).__class__, name)
    made._experts_implementation = "eager"
    made.architectures = made.architectures or []
    if getattr(made, "is_encoder_decoder", False) and not hasattr(made, "decoder_start_token_id"):
        made.decoder_start_token_id = 0
    return made


def _small(kind: Any, name: str, inside: Any = None) -> Any:
    """``inside``: what another configuration has made of this one, by default."""
    default = kind()
    default.allow_global_per_layer_attribute_access = True
    changes: dict[str, Any] = {
        n: value for value, names in _NAMES.items() for n in names
        if hasattr(default, n) and not isinstance(getattr(kind, n, None), property)
        and not isinstance(getattr(default, n), list | tuple)
    }  # fmt: skip
    if isinstance(patch := getattr(default, "patch_size", None), int):
        changes["patch_size"] = min(patch, 8)
    if getattr(default, "qk_rope_head_dim", None) == 0:  # heads without a part that turns
        changes["qk_rope_head_dim"] = 0
    changes |= _layers(default) | _stages(default, changes)
    if "depths" in changes or "depth" in changes:  # widths of stages belong together
        changes = {k: v for k, v in changes.items() if k in _BESIDE_STAGES}
    else:
        changes |= _as_wide(default, changes)
    for n, value in vars(default).items():
        if ("drop" in n or "jitter" in n) and isinstance(value, float):
            changes[n] = 0.0
        if "drop" in n and isinstance(value, tuple):
            changes[n] = (0.0,) * len(value)
        if value is None and isinstance(given := getattr(inside, n, None), int | str):
            changes[n] = changes.get(n, given)
    rope = getattr(default, "rope_parameters", None) or {}
    if "rope_theta" in rope and ("mrope_section" in rope or inside is not None):
        # beside images: half of what turns in a head, by time, height and width
        half = int(changes.get("head_dim", 8) * rope.get("partial_rotary_factor", 1.0)) // 2
        changes["rope_parameters"] = {
            **rope,
            "mrope_section": _thirds(half, rope.get("mrope_section", (2, 1, 1))),
        }
    if hasattr(default, "kv_lora_rank"):  # latent attention makes keys for every head
        changes["num_key_value_heads"] = changes.get("num_attention_heads", 4)
    for part in getattr(kind, "sub_configs", {}):
        if (inner := getattr(default, part, None)) is not None:
            changes[part] = _small(type(inner), inner.model_type, inner).to_dict()
    own = _OWN.get(name, {})
    if "layer_types" in own:
        changes["num_hidden_layers"] = len(own["layer_types"])
    return kind(**{**changes, **own})


_BESIDE_STAGES = ("image_size", "out_hidden_size", "depth", "depths", "patch_size", "window_size")


def _stages(default: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """One layer in every stage, and an image that has windows in the last."""
    found: dict[str, Any] = {
        n: [1] * len(stages) for n in ("depth", "depths")
        if isinstance(stages := getattr(default, n, None), list | tuple)
    }  # fmt: skip
    if found and isinstance(getattr(default, "image_size", None), list | tuple):
        found["image_size"] = (IMAGE, IMAGE)
    sizes = [getattr(default, n, None) for n in ("patch_size", "window_size")]
    if found and all(isinstance(n, int) for n in sizes):
        found |= {"patch_size": 2, "window_size": 2}
    elif found:
        changes.pop("patch_size", None)
    return found


def _layers(default: Any) -> dict[str, Any]:
    """A layer of every kind there is, and layers to take features from that there are."""
    found: dict[str, Any] = {}
    kinds = vars(default).get("layer_types") or ()
    if len(set(kinds[:2])) == 1 < len(set(kinds)):
        found["layer_types"] = list(dict.fromkeys(kinds))
        found["num_hidden_layers"] = len(found["layer_types"])
    if getattr(default, "mlp_layer_types", ()) is None:
        found["mlp_layer_types"] = ["dense", "sparse"]
    for n, value in vars(default).items():
        if n.endswith("feature_layer") and isinstance(value, list | tuple):
            found[n] = [-1 - i % 2 for i in range(len(value))]
    if getattr(default, "vocabulary_map", ()) is None:
        found["vocabulary_map"] = {"<image>": VOCAB - 1, "<|extra_200|>": VOCAB - 2}
    if getattr(default, "languages", None):
        found["default_language"] = default.languages[0]
    return found


def _as_wide(default: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """What is as wide as the hidden states stays so, and heads as wide as their two parts."""
    wide = getattr(default, "hidden_size", 0)
    found = {
        n: changes["hidden_size"] for n, value in vars(default).items()
        if n not in changes and type(value) is int and value == wide > 128
        and n.endswith(("_size", "_dim")) and "hidden_size" in changes
    }  # fmt: skip
    parts = [getattr(default, n, None) for n in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(parts) and getattr(default, "head_dim", None) == sum(parts):
        found["head_dim"] = changes["qk_nope_head_dim"] + changes["qk_rope_head_dim"]
    return found


def _thirds(half: int, like: Any) -> list[int]:
    """``half`` in three, of which those are alike that are in ``like``."""
    odd = next((i for i in (0, 1, 2) if like[i - 1] == like[i - 2]), 0)
    return [half - half // 4 * 2 if i == odd else half // 4 for i in range(3)]


def model(name: str) -> nn.Module:
    """A model in train mode with random weights, norms and biases included."""
    torch.manual_seed(0)
    net = tf.AutoModelForCausalLM.from_config(config(name)).double().train()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return net  # type: ignore[no-any-return]


def batch(length: int, *, padded: bool) -> dict[str, Tensor]:
    """Ids and labels ``[2, length]``; ``padded``: the first row on the left."""
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    out = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        out["labels"][mask == 0] = -100
        out["attention_mask"] = mask
    return out
