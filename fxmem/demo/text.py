"""A long real text that every Python has: the language's own reference topics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxmem.optional import UsageError


def long_text() -> str:
    """About 460 000 characters of English prose about Python, in a fixed order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def token_ids(length: int, tokenizer: Callable[..., Any] | None, vocabulary: int) -> torch.Tensor:
    """The first ``length`` tokens of the text as ids [1, length].

    Without a tokenizer the bytes of the text are the tokens.

    Raises:
        UsageError: the text is shorter than that, or the vocabulary cannot hold the tokens.
    """
    # No tokenizer makes tokens longer than this on average, and short texts tokenize faster.
    text = long_text()[: 12 * length]
    ids = list(text.encode()) if tokenizer is None else list(tokenizer(text)["input_ids"])
    if length < 2 or len(ids) < length:
        raise UsageError(
            f"length {length} is not possible", advice=f"choose a length from 2 to {len(ids)}"
        )
    if max(ids[:length]) >= vocabulary:
        raise UsageError(
            f"token {max(ids[:length])} is outside the model's vocabulary of {vocabulary}",
            advice="name a model that comes with its own tokenizer",
        )
    return torch.tensor([ids[:length]])
