"""Parameters that are whole only while a region runs: the interface between the loop over regions
and what gathers parameters and reduces gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

from fxmem.errors import FxmemError
from fxmem.streaming.shards import Shards


class RegionShards(Protocol):
    """What is done around one region, once per pass, whatever the number of chunks."""

    def before_forward(self) -> None:
        """The region's parameters become whole."""

    def after_forward(self) -> None:
        """Those that no later region of the forward uses may go."""

    def backward(self) -> AbstractContextManager[None]:
        """The region's parameters are whole inside; if it fails, the step is given up."""

    def take(self, grads: list[Tensor | None], nodes: Sequence[Any]) -> None:
        """Reduce what is complete when autograd has ``grads``, which are those of the region's
        tensors. Take those out that no node of autograd's graph gets.
        """


class Sharding(Protocol):
    """The sharded parameters of the model whose call is running."""

    def spread(self, inputs: Mapping[str, Any]) -> Shards:
        """Of the parameters among the inputs of a graph."""

    def regions(
        self,
        tensors: Sequence[Sequence[Any]],
        learns: Sequence[bool],
        later: Sequence[Any],
        calls: Sequence[Mapping[tuple[str, int], bool]],
    ) -> Sequence[RegionShards]:
        """For the regions of a capture in order, by the tensors that each takes, and whether a
        backward enters it. ``later``: what is read after the call. ``calls``: of modules that each
        is a part of, by path and number, and whether they are given what wants a gradient.
        """  # fmt: skip

    def shard(self, parameter: Tensor) -> Tensor:
        """What an optimizer changes: this rank's part, or the parameter itself."""

    def outside(self, run: Callable[[], Sequence[Tensor]], inputs: Sequence[Any]) -> Any:
        """``run()``, which reads parameters among ``inputs`` after the call has ended."""

    def begin_backward(self) -> None:
        """In the pass that all gradients are part of, before a pass inside it."""


class NotStreamedError(FxmemError):
    """The call is to run as it is in plain PyTorch, which gathers parameters by itself."""


_CURRENT: ContextVar[Sharding | None] = ContextVar("sharding", default=None)


def current() -> Sharding | None:
    """Of the call that is running; None where all parameters are whole."""
    return _CURRENT.get()


@contextlib.contextmanager
def using(sharding: Sharding) -> Iterator[None]:
    """Regions that run inside belong to a model with these parameters."""
    token = _CURRENT.set(sharding)
    try:
        yield
    finally:
        _CURRENT.reset(token)
