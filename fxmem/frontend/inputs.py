"""Inputs of a call in one layout, each a tensor of its own.

Dynamo tells layouts apart: a view (a slice of a long text, a transposed or expanded tensor) or one
tensor given twice would each be captured anew. What lies plainly is given by another name, without
the base it is a view of; the rest is copied where it is small.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat.graph import is_view

COPY_BYTES = 16 << 20
"""What is larger keeps its layout: that costs a capture, a copy would cost memory."""
_CACHES = ("past_key_values", "cache", "cache_params")


@contextlib.contextmanager
def uniform(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The arguments of a call with its tensors laid out plainly.

    Lists and dicts among them are the caller's own while the call runs, so that what it does to
    them (``batch.pop("labels")``) is seen; on leaving they have their own tensors again, and what
    was written to a copy is written to the original.
    """
    given = _Given()
    try:
        yield [given.take(a) for a in args], {k: given.take(v) for k, v in kwargs.items()}
    finally:
        given.give_back()


def without_cache(
    model: nn.Module, kwargs: Mapping[str, Any], args: Sequence[Any] = ()
) -> dict[str, Any]:
    """``kwargs``, and no cache of keys and values where the model would make one for nobody.

    Its tensors would leave the call, and layers that share it cannot share a trace. Whoever gives a
    cache or asks for one gets it. Where positions may tell packed documents apart, the model is
    asked as it is: transformers looks for documents only where there is no cache.
    """
    given = _by_name(model, kwargs, args)
    packed = given.get("position_ids") is not None and given.get("attention_mask") is None
    if packed or "use_cache" in given or not makes_cache(model, kwargs, args):
        return dict(kwargs)
    return {**kwargs, "use_cache": False}


def makes_cache(model: nn.Module, kwargs: Mapping[str, Any], args: Sequence[Any] = ()) -> bool:
    """Whether the model makes or fills a cache of keys and values in this call."""
    given = _by_name(model, kwargs, args)
    if any(given.get(name) is not None for name in _CACHES):
        return True
    takes = inspect.signature(model.forward).parameters
    own = "use_cache" in takes
    if not own and all(p.kind is not p.VAR_KEYWORD for p in takes.values()):
        return False
    default = getattr(getattr(model, "config", None), "use_cache", own)
    asked = given.get("use_cache")
    return bool(default if asked is None else asked)


def _by_name(model: nn.Module, kwargs: Mapping[str, Any], args: Sequence[Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments of a call, by name or position."""
    found = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


class _Given:
    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.own: dict[int, tuple[Any, Any]] = {}
        """``id`` of a replacement -> it and what the caller gave."""
        self.copies: list[tuple[Tensor, Tensor, int]] = []
        self.containers: dict[int, list[Any] | dict[Any, Any]] = {}

    def take(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) is tuple:
            return self._replace(value, tuple([self.take(v) for v in value]))
        if type(value) in (list, dict) and id(value) not in self.containers:
            self.containers[id(value)] = value
            for key, item in _items(value):
                new = self.take(item)
                if new is not item:
                    value[key] = new
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_nested:
            return value
        known, plain = id(value) in self.seen, _is_plain(value)
        self.seen.add(id(value))
        fixed = value.is_inference()  # such a tensor counts no writes, and cannot be saved
        if plain and not known and not fixed and not is_view(value):
            return value
        if plain and not value.requires_grad and not fixed:
            new = value.detach()
        elif value.nbytes <= COPY_BYTES or fixed:
            new = value.clone(memory_format=torch.contiguous_format)
            self.copies.append((new, value, new._version))
        else:
            return value
        return self._replace(value, new)

    def _replace(self, value: Any, new: Any) -> Any:
        self.own[id(new)] = (new, value)
        return new

    def give_back(self) -> None:
        for container in self.containers.values():
            for key, item in _items(container):
                if id(item) in self.own:
                    container[key] = self.own[id(item)][1]
        for new, value, version in self.copies:
            if new._version != version:
                with torch.inference_mode(value.is_inference()), torch.no_grad():
                    value.copy_(new)


def _items(container: list[Any] | dict[Any, Any]) -> list[tuple[Any, Any]]:
    return list(enumerate(container) if isinstance(container, list) else container.items())


def _is_plain(value: Tensor) -> bool:
    """As a new tensor lies: no offset, and dense strides, of dimensions of one row too."""
    step, strides = 1, []
    for size in reversed(value.shape):
        strides.append(step)
        step *= max(size, 1)
    return value.storage_offset() == 0 and list(value.stride()) == strides[::-1]
