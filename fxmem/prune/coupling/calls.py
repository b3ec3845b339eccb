"""How a model is called while it is pruned: with an example of its user, or with token ids.

A language model needs no example: token ids come first, no cache where it would make one, and the
same ids for a decoder that has its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat.graph import tree_leaves, tree_map_only
from fxmem.errors import CaptureError
from fxmem.frontend.inputs import without_cache


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor)]

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Inputs:
        """The same call with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        given = tree_map_only(Tensor, lambda _: next(left), (self.args, dict(self.kwargs)))
        return Inputs(*given)


_GIVEN: weakref.WeakKeyDictionary[nn.Module, Inputs] = weakref.WeakKeyDictionary()


def inputs(
    model: nn.Module, example: Any = None, kwargs: Mapping[str, Any] | None = None
) -> Inputs:
    """What ``model`` is called with: the example, which is kept, that of before, or token ids.

    Args:
        model: any module.
        example: a tensor, or all positional arguments.
        kwargs: keyword arguments.

    Raises:
        CaptureError: no example, and the model reads no token ids.
    """
    if example is not None or kwargs:
        args = () if example is None else tuple(example) if _several(example) else (example,)
        found = Inputs(args, without_cache(model, kwargs or {}))
        if not found.tensors:
            raise CaptureError(
                f"the example for {type(model).__name__} has no tensor",
                advice="give what the model is called with: fxmem.coupling(model, (x,), {...})",
            )
        if not kwargs and _ids(model, args):
            return tokens(model, args[0])
        _GIVEN[model] = found
        return found
    if model in _GIVEN:
        return _GIVEN[model]
    if _embedding(model) is None:
        raise CaptureError(
            f"{type(model).__name__} has no embedding of tokens, so what it reads is not known",
            advice="give an example of its inputs: fxmem.coupling(model, (x,), {...})",
        )
    ids = torch.zeros(3, 11, dtype=torch.long, device=next(model.parameters()).device)
    return tokens(model, ids)


def trials(model: nn.Module) -> list[Inputs]:
    """What two models are compared on: the example, or token ids of two lengths."""
    if model in _GIVEN or _embedding(model) is None:
        return [inputs(model)]
    return [tokens(model, ids) for ids in token_ids(model)]


def has_example(model: nn.Module) -> bool:
    """Whether a user gave an example of what ``model`` reads."""
    return model in _GIVEN


def same_inputs(model: nn.Module, source: nn.Module) -> None:
    """Let ``model`` be called as ``source`` is."""
    if source in _GIVEN:
        _GIVEN[model] = _GIVEN[source]


def token_ids(model: nn.Module) -> list[Tensor]:
    """Ids of two lengths, ``[2, 7]`` and ``[2, 8]``."""
    table = _embedding(model)
    assert table is not None
    device = next(model.parameters()).device
    return [torch.arange(2 * n, device=device).view(2, n) % table.num_embeddings for n in (7, 8)]


def tokens(model: nn.Module, ids: Tensor) -> Inputs:
    """The call of a language model with token ids ``[batch, length]``."""
    given = without_cache(model, {})
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    return Inputs((ids,), given)


def results(model: nn.Module, given: Inputs, run: Callable[..., Any] | None = None) -> list[Tensor]:
    """What a call gives: the logits, where it says which they are, else all real tensors.

    Raises:
        CaptureError: there is none.
    """
    out = (run or model)(*given.args, **given.kwargs)
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    found = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise CaptureError(
            f"{type(model).__name__} returns no logits and no other tensor that fxmem can see",
            advice="return tensors, alone or in tuples, lists and dicts, or an object with logits",
        )
    return found


def logits(model: nn.Module, ids: Tensor, run: Callable[..., Any] | None = None) -> Tensor:
    """Logits ``[batch, length, vocabulary]`` for token ids ``[batch, length]``."""
    return results(model, tokens(model, ids), run)[0]


def _several(example: Any) -> bool:
    return isinstance(example, tuple | list)


def _embedding(model: nn.Module) -> nn.Embedding | None:
    return next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


def _ids(model: nn.Module, args: tuple[Any, ...]) -> bool:
    first = args[0] if len(args) == 1 else None
    return (
        isinstance(first, Tensor) and first.dtype == torch.long and first.dim() == 2
        and _embedding(model) is not None
    )  # fmt: skip


__all__ = [
    "Inputs", "has_example", "inputs", "logits", "results", "same_inputs", "token_ids", "tokens",
    "trials",
]  # fmt: skip
