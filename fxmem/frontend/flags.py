"""One capture for all patterns of ``requires_grad``.

Dynamo guards on the flag of every parameter, so a model that freezes other layers at each step
would be captured anew each time. While Dynamo looks, parameters that have learnt before are shown
as learning; when the captured graph runs, the flags are the user's again, and each region runs the
variant of its backward that makes the gradients that are wanted now.

The first pattern is captured as it is: what is frozen for good costs nothing. With the first
parameter that is unfrozen later, every parameter is shown as learning from then on. A model whose
code asks for the flag, or that hooks watch, is always shown the truth.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from fxmem._compat import flags as _compat_flags


class Flags:
    """What Dynamo is shown of one model's flags.

    Attributes:
        truth: the flags are always shown as they are.
        pretending: parameters that are shown as learning now, and do not.
    """

    def __init__(self) -> None:
        self.truth = False
        self.pretending: list[nn.Parameter] = []
        self._shown: dict[int, weakref.ref[nn.Parameter]] | None = None
        self._wide, self._told, self._unfinished = True, False, False
        self._reads: list[str] = []

    @contextlib.contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """Dynamo may look at the flags inside; see :meth:`real`."""
        self._unfinished = False
        if self.truth:
            yield
            return
        parameters = list(model.parameters())
        learning = [p for p in parameters if p.requires_grad]
        if self._shown is None or not self._wide:
            self._shown = (self._shown or {}) | _refs(learning)
        elif not all(map(self._was_shown, learning)):
            self._shown = _refs([p for p in parameters if p.is_leaf and p.is_floating_point()])
        self.pretending = [p for p in parameters if not p.requires_grad and self._was_shown(p)]
        try:
            with _compat_flags.reads() as self._reads:
                for p in self.pretending:
                    p.requires_grad_(True)
                yield
        finally:
            self._unfinished = bool(self.pretending)
            self.real()

    def _was_shown(self, parameter: nn.Parameter) -> bool:
        ref = (self._shown or {}).get(id(parameter))
        return ref is not None and ref() is parameter

    def real(self) -> None:
        """From here on the flags are the user's."""
        for p in self.pretending:
            p.requires_grad_(False)
        self.pretending = []

    def run(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` under the user's flags."""

        def call(*args: Any) -> Any:
            self.real()
            return fn(*args)

        return call

    def captured(self, *, watched: bool) -> bool:
        """A capture has been made; ``watched``: hooks hang on its values. False where it must be
        made again, because it may depend on a flag that was not shown as it is.
        """
        self._told |= watched or bool(self._reads)
        self.truth = self._told and not self.pretending
        return not self._told or self.truth

    def try_again(self) -> bool:
        """A call failed; whether it may succeed with more of the truth, which is shown next."""
        if not self._unfinished:
            return False
        self._shown = None
        self.truth, self._wide = self._told or bool(self._reads) or not self._wide, False
        return True


def _refs(parameters: Iterable[nn.Parameter]) -> dict[int, weakref.ref[nn.Parameter]]:
    """By identity; another parameter may get the ``id`` of one that is gone."""
    return {id(p): weakref.ref(p) for p in parameters}


__all__ = ["Flags"]
