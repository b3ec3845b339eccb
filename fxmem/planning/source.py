"""Configurations of models, by folder or hub id."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from fxmem.optional import UsageError, require

ADVICE = 'name a folder with config.json, a hub id, "smollm2" or "tiny"'


def config_of(source: str) -> Any:
    """The configuration of a causal language model; ``source`` is a folder or a hub id.

    Raises:
        UsageError: there is no such model, or it is none of language.
    """
    given = {"local_files_only": is_here(source)}
    try:
        config = require("transformers").AutoConfig.from_pretrained(source, **given)
    except (OSError, ValueError) as error:
        raise no_model(source, error) from error
    check_kind(source, config)
    return config


def is_here(source: str) -> bool:
    """Whether everything lies on this machine: a folder, or a hub id that was fetched before and
    cannot be asked for now.

    Raises:
        UsageError: there is no such folder, or the hub cannot be reached; at once, without retries.
    """
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise UsageError(f"the folder {source!r} has no config.json", advice=ADVICE)
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise UsageError(f"there is no folder {source!r}", advice=ADVICE)
    hub = require("huggingface_hub")
    known = isinstance(hub.try_to_load_from_cache(source, "config.json"), str)
    if _reachable(hub.constants):
        return False
    if not known:
        raise UsageError(
            f"there is no folder {source!r}, and the hub cannot be reached to ask for a model of "
            "this name", advice=ADVICE,
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


def check_kind(source: str, config: Any) -> None:
    """Refuse, with a UsageError, what is no causal language model."""
    if type(config) not in require("transformers").MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"{source!r} is a model of the kind {config.model_type!r}, which is no causal language "
            "model", advice="the command line takes causal language models; in Python, "
            "fxmem.transform takes any module that trains",
        )  # fmt: skip


def no_model(source: str, error: Exception) -> UsageError:
    """The error for a source whose configuration or weights cannot be read."""
    first = " ".join(str(error).split())[:200]
    return UsageError(f"no usable language model at {source!r}: {first}", advice=ADVICE)
