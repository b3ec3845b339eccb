"""A model whose own forward cannot be captured as one graph, and has no part around the fault that
could run as it is: it is captured in parts.

Dynamo ends a graph before the line that it cannot take, Python runs that line, and another graph
begins behind it. Each of them streams; what passes between them is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from fxmem._compat import errors as dynamo
from fxmem.errors import CaptureError, FxmemWarning, InternalError
from fxmem.frontend.attributes import Attributes, held_values, put_back
from fxmem.frontend.random_state import RandomState


class InParts:
    """Whether and why one model, of class ``name``, is captured in parts.

    Attributes:
        error: what its capture as one graph ends with.
        now: it is captured in parts. False again where that fails too.
        cause: what ``error`` came from, while it is not known whether parts can be captured.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name
        self.error: CaptureError | None = None
        self.cause: Exception | None = None
        self.now = self._done = False
        self._before: tuple[list[tuple[Tensor, Tensor]], Attributes, RandomState] | None = None

    @property
    def reason(self) -> str | None:
        """What stands in the way of one graph, and where."""
        if self.error is None or not self.now:
            return None
        what = self.error.what.removeprefix(f"{self._name} cannot be captured: ")
        return f"{what} at {self.error.source}" if self.error.source else what

    def begin(self, model: nn.Module, given: Iterable[Tensor]) -> None:
        """A call of ``model`` with ``given`` begins: in parts, some have run when another fails."""
        if self.now:
            self._before = held_values(model), Attributes(model), RandomState.now(given)

    def take_back(self) -> None:
        """Buffers, attributes of modules and random numbers as they were when the call began."""
        if self._before is not None:
            buffers, attributes, random = self._before
            put_back(buffers)
            attributes.restore()
            random.restore()

    @property
    def possible(self) -> bool:
        """It may still turn out that the model can be captured in parts."""
        return not self._done and (self.error is None or self.now)

    def found(self, error: Exception, named: Exception) -> bool:
        """Whether a call that failed with ``error``, which is to leave as ``named``, may succeed
        in parts.
        """
        if self.error is not None or dynamo.over_limit(error):
            return False
        if isinstance(named, CaptureError):
            self.error, self.cause, self.now = named, error, True
        return self.now

    def failed(self, error: Exception, named: Exception) -> Exception:
        """What is to leave in place of ``named``: a first call in parts could not be made."""
        own = named is error and not isinstance(named, (CaptureError, InternalError))
        if not self.now or self._done or own or self.error is None:
            return named
        self.take_back()
        self.now, self._before = False, None
        return self.error

    def ran(self) -> None:
        """A call has succeeded. Says, once, that it was in parts."""
        self._before = self.cause = None
        if self.now and not self._done:
            self._done = True
            warnings.warn(
                f"{self._name} is captured in parts, each of which streams: "
                f"{self.reason}", FxmemWarning, stacklevel=2,
            )  # fmt: skip


__all__ = ["InParts"]
