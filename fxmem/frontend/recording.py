"""A run of a model as it is, that records what its pieces are given and give."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fxmem._compat import hooks as _compat_hooks
from fxmem._compat import overrides as _compat
from fxmem.frontend.attributes import Attributes, held_values, put_back
from fxmem.frontend.piece import Piece, PieceCall
from fxmem.frontend.random_state import RandomState
from fxmem.frontend.structure import IrregularError, describe, rebuild

WORTH = 2
"""A piece is checkpointed where it saves this many times the bytes that it is given."""


class Recording:
    """Within it, calls of the pieces are recorded while the model runs as it is, without gradients
    (each piece alone has them) and hooks, from the random numbers, buffers and attributes of
    modules that are there after it again. What a hook would change is learnt when the piece runs.
    """

    def __init__(
        self, model: nn.Module, pieces: Sequence[Piece], given: Mapping[str, Tensor]
    ) -> None:
        self.model, self.pieces, self.given = model, pieces, given
        self.calls: dict[Piece, list[PieceCall]] = {p: [] for p in pieces}
        self._stack, self._inside = contextlib.ExitStack(), False

    def __enter__(self) -> Recording:
        stack = self._stack
        self._held = held_values(self.model)
        self._attributes = Attributes(self.model)
        self._random = RandomState.now([*self.given.values(), *self.model.parameters()])
        stack.enter_context(torch.no_grad())
        stack.enter_context(_compat_hooks.without_hooks(self.model))
        for piece in self.pieces:
            stack.enter_context(piece.replaced(self._recorder(piece)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        put_back(self._held)
        self._attributes.restore()
        self._random.restore()

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def changed(self) -> bool:
        """Take over what was recorded; whether it is other than what was known."""
        other = False
        for piece, calls in self.calls.items():
            known = [c.expected() for c in piece.calls]
            if known != [c.expected() for c in calls]:
                piece.calls, other = calls, True
        return other

    def _recorder(self, piece: Piece) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a part of another piece
                return piece.own(*args, **kwargs)
            inputs: list[Tensor] = []
            described = describe((args, kwargs), inputs)
            with torch.enable_grad():
                fresh = [_fresh(t) for t in inputs]
                own_args, own_kwargs = rebuild(described, fresh)
                before = [_compat.version(t) for t in inputs]
                buffers = [(b, b.clone()) for b in self.model.buffers()]
                attributes = Attributes(self.model)
                start = time.perf_counter()
                with _counting(inputs, piece.module) as count, self._within():
                    value = piece.own(*own_args, **own_kwargs)
                piece.seconds += time.perf_counter() - start
            if before != [_compat.version(t) for t in inputs]:
                raise IrregularError(f"{piece} writes to its argument")
            results: list[Tensor] = []
            description = describe(value, results)
            self.calls[piece].append(PieceCall(piece, description, results, self.given))
            piece.changed |= attributes.changed()
            piece.writes_to(b for b, was in buffers if not _same(b, was))
            piece.saved_bytes += count[0]
            heavy = count[0] > WORTH * sum(t.nbytes for t in inputs)
            piece.checkpointed = (
                heavy and not piece.written and not _compat_hooks.has_hooks(piece.module)
            )
            return rebuild(description, [r.detach() for r in results])

        return call


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, as a write through ``.data`` leaves no other trace."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _fresh(t: Tensor) -> Tensor:
    return t.detach().requires_grad_() if t.is_floating_point() else t


@contextlib.contextmanager
def _counting(inputs: Sequence[Tensor], module: nn.Module) -> Iterator[list[int]]:
    """Bytes that autograd saves beside ``inputs`` and the module's own tensors."""
    known = {t.untyped_storage().data_ptr()
             for t in (*inputs, *module.parameters(), *module.buffers())}  # fmt: skip
    count = [0]

    def pack(t: Tensor) -> Tensor:
        at = t.untyped_storage().data_ptr()
        if at not in known:
            known.add(at)
            count[0] += t.nbytes
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield count


__all__ = ["Recording"]
