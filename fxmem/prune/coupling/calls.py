"""How a language model is called: token ids first, no cache where it would make one, and the same
ids for a decoder that has its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxmem.errors import CaptureError


def logits(model: nn.Module, ids: Tensor, run: Callable[..., Any] | None = None) -> Tensor:
    """Logits ``[batch, length, vocabulary]`` for token ids ``[batch, length]``.

    Args:
        model: of transformers, or one of your own whose first argument is the ids and that returns
            the logits, alone or as an attribute.
        ids: what it reads.
        run: called in the place of `model`.

    Raises:
        CaptureError: it returns no logits.
    """
    names = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    out = (run or model)(ids, **given)
    found = getattr(out, "logits", out)
    if not isinstance(found, Tensor):
        raise CaptureError(
            f"{type(model).__name__} returns no logits",
            advice="models that read token ids and return logits can be pruned",
        )
    return found


__all__ = ["logits"]
