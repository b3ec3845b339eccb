"""The models that the demo, the benchmark and ``fxmem explain`` work on."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxmem.optional import UsageError, require

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


RANDOM: dict[str, Callable[[], Any]] = {
    TINY: tiny_config, "tiny-mamba2": tiny_mamba2_config, "tiny-qwen3-next": tiny_qwen3_next_config
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
    given = {"local_files_only": _is_here(source)}
    try:
        _check_kind(source, transformers.AutoConfig.from_pretrained(source, **given))
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **given)
    except (OSError, ValueError) as error:
        raise _unknown(source, error) from error
    return model.train()


def random_model(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of this configuration with random weights; only the configuration is read.

    Raises:
        UsageError: there is no such model.
    """
    if source in RANDOM:
        return load_model(source, dtype)
    transformers = require("transformers")
    given = {"local_files_only": _is_here(source)}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **given)
        _check_kind(source, config)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _unknown(source, error) from error
    return model.train()


def load_tokenizer(source: str) -> Any | None:
    """The model's tokenizer; None for one of :data:`RANDOM`: the bytes of a text are its tokens.

    Raises:
        UsageError: the folder or hub id has none.
    """
    if source in RANDOM:
        return None
    transformers = require("transformers")
    here = _is_here(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=here)
    except (OSError, ValueError) as error:
        raise _unknown(source, error) from error


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


def _is_here(source: str) -> bool:
    """Whether everything lies on this machine: a folder, or a hub id that was fetched before and
    cannot be asked for now.

    Raises:
        UsageError: there is no such folder, or the hub cannot be reached; at once, without retries.
    """
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise UsageError(f"the folder {source!r} has no config.json", advice=_ADVICE)
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise UsageError(f"there is no folder {source!r}", advice=_ADVICE)
    hub = require("huggingface_hub")
    known = isinstance(hub.try_to_load_from_cache(source, "config.json"), str)
    if _reachable(hub.constants):
        return False
    if not known:
        raise UsageError(
            f"there is no folder {source!r}, and the hub cannot be reached to ask for a model of "
            "this name", advice=_ADVICE,
        )  # fmt: skip
    return True


def _reachable(constants: Any) -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # a proxy knows names that this machine does not
    where = urllib.parse.urlsplit(constants.ENDPOINT)
    port = where.port or (80 if where.scheme == "http" else 443)
    try:
        socket.create_connection((where.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def _check_kind(source: str, config: Any) -> None:
    if type(config) not in require("transformers").MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"{source!r} is a model of the kind {config.model_type!r}, which is no causal language "
            "model", advice="the command line takes causal language models; in Python, "
            "fxmem.transform takes any module that trains",
        )  # fmt: skip


_ADVICE = 'name a folder with config.json, a hub id, "smollm2" or "tiny"'


def _unknown(source: str, error: Exception) -> UsageError:
    first = " ".join(str(error).split())[:200]
    return UsageError(f"no usable language model at {source!r}: {first}", advice=_ADVICE)
