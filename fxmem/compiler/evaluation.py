"""Calls without gradients: which of them stream, and what becomes of one that cannot.

A decoding step has nothing to gain, and no call of evaluation may fail because of streaming: it
then runs as plain PyTorch, with one warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import FxmemWarning
from fxmem.plan.plan import Stream

LEAST_BYTES = 32 << 20
"""With automatic chunks, a call whose widest value is smaller is not captured."""


class Evaluation:
    """The calls of one model without gradients; ``streamed(args, kwargs)`` runs one in chunks."""

    def __init__(
        self, model: nn.Module, stream: Stream | None, plain: Callable[..., Any],
        streamed: Callable[[Any, Any], Any],
    ) -> None:  # fmt: skip
        self.stream, self._plain, self._streamed = stream, plain, streamed
        self.model, self.failed = model, False

    def __call__(self, args: Any, kwargs: Any) -> Any:
        if self.failed or not self._gains(args, kwargs):
            return self._plain(*args, **kwargs)
        name = type(self.model).__name__
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._streamed(args, kwargs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            result = self._plain(*args, **kwargs)  # a fault of the values is raised here
            self.failed = True
            why = str(getattr(error, "what", error)).split("\n")[0]
            warnings.warn(
                f"{name} without gradients runs as plain PyTorch, since {why}", FxmemWarning,
                stacklevel=3,
            )  # fmt: skip
            return result

    def _gains(self, args: Any, kwargs: Any) -> bool:
        try:
            tokens = max(map(_tokens, _leaves((args, kwargs))), default=0)
        except _NotPlainError:  # a cache of keys and values: the call is a step of decoding
            return False
        if self.stream is None or tokens < 2:
            return False
        automatic = self.stream.chunk == self.stream.loss_chunk == "auto"
        return not automatic or 4 * tokens * self._widest >= LEAST_BYTES

    @functools.cached_property
    def _widest(self) -> int:
        return max((max(p.shape) for p in self.model.parameters() if p.dim() > 1), default=0)


class _NotPlainError(Exception):
    """An argument that is neither tensor nor number."""


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _leaves(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif not isinstance(value, (int, float, str, type(None), torch.dtype, torch.device)):
        raise _NotPlainError


def _tokens(value: Tensor) -> int:
    """Rows of states, or elements of ids."""
    if value.is_floating_point() and value.dim():
        return value.numel() // max(1, value.shape[-1])
    return value.numel()


__all__ = ["Evaluation"]
