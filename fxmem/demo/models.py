"""The models that the demo, the benchmark and ``fxmem explain`` work on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxmem.optional import UsageError, require
from fxmem.planning.source import check_kind, config_of, is_here, no_model

TINY = "tiny"
"""Name of the random two-layer Llama; its tokens are bytes."""

SMOLLM2 = "smollm2"
"""Name of the pretrained SmolLM2-135M; see :mod:`fxmem.demo.fetch`."""


def tiny_config() -> Any:
    """Hidden size 256, two layers, vocabulary 16384, untied: 39.5 MiB of float32 parameters."""
    return require("transformers").LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=16384,
        max_position_embeddings=8192,
        use_cache=False,
    )


def tiny_mamba2_config() -> Any:
    """A state-space model of four layers: hidden size 256, vocabulary 2048."""
    return require("transformers").Mamba2Config(
        hidden_size=256, num_hidden_layers=4, num_heads=16, head_dim=32, state_size=64, n_groups=1,
        chunk_size=128, vocab_size=2048, use_cache=False,
    )  # fmt: skip


def tiny_qwen3_next_config() -> Any:
    """Three layers of the gated delta rule and one of attention, with experts, of the same size."""
    return require("transformers").Qwen3NextConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=32, linear_value_head_dim=32, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=128, shared_expert_intermediate_size=128, vocab_size=2048,
        use_cache=False,
    )  # fmt: skip


def tiny_moe_config() -> Any:
    """Mixtral with four layers and eight experts, of which a token takes two."""
    return require("transformers").MixtralConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=8192,
        max_position_embeddings=32768, use_cache=False,
    )  # fmt: skip


RANDOM: dict[str, Callable[[], Any]] = {
    TINY: tiny_config, "tiny-mamba2": tiny_mamba2_config, "tiny-moe": tiny_moe_config,
    "tiny-qwen3-next": tiny_qwen3_next_config,
}  # fmt: skip
"""Models with random weights, by name."""


def load_model(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with its weights, in training mode; ``source`` is in :data:`RANDOM`, a folder or a
    hub id.

    Raises:
        UsageError: there is no such model.
    """
    transformers = require("transformers")
    if source in RANDOM:
        torch.manual_seed(0)
        config = RANDOM[source]()
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    given = {"local_files_only": is_here(source)}
    try:
        check_kind(source, transformers.AutoConfig.from_pretrained(source, **given))
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **given)
    except (OSError, ValueError) as error:
        raise no_model(source, error) from error
    return model.train()


def random_model(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of this configuration with random weights; only the configuration is read.

    Raises:
        UsageError: there is no such model.
    """
    if source in RANDOM:
        return load_model(source, dtype)
    transformers = require("transformers")
    config = config_of(source)
    torch.manual_seed(0)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise no_model(source, error) from error
    return model.train()


def load_tokenizer(source: str) -> Any | None:
    """The model's tokenizer; None for one of :data:`RANDOM`: the bytes of a text are its tokens.

    Raises:
        UsageError: the folder or hub id has none.
    """
    if source in RANDOM:
        return None
    transformers = require("transformers")
    here = is_here(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=here)
    except (OSError, ValueError) as error:
        raise no_model(source, error) from error


def resolve(source: str) -> str:
    """An absolute path where ``source`` is a folder here; otherwise as given."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def enable_checkpointing(model: Any) -> None:
    """Switch on transformers' own activation checkpointing, whichever of its two names exists."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)()
            return
    raise UsageError(f"{type(model).__name__} has no activation checkpointing")
