"""One piece of a model that runs as it is; see :mod:`fxmem.frontend.opaque`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxmem._compat import capture_stack
from fxmem._compat import overrides as _compat
from fxmem.frontend.attributes import Attribute, put_back
from fxmem.frontend.experts import streamable
from fxmem.frontend.faults import AS_IT_IS
from fxmem.frontend.random_state import RandomState
from fxmem.frontend.recurrences import carried_kernels
from fxmem.frontend.structure import describe, rebuild

Size = int | tuple[str, int]
"""A number, or that of a dimension of a tensor of the model's call, by its name."""


class Again(BaseException):
    """A call must start again: a piece gave something else than was expected of it.

    No error, so that no handler on the way takes it for one.
    """

    def __init__(
        self, call: PieceCall, description: Any, results: Sequence[Tensor], writes: bool
    ) -> None:
        self.call, self.description, self.results = call, description, results
        self.writes = writes

    def learn(self, pieces: Sequence[Piece]) -> bool:
        """Expect what was given now, of every call of this kind of which the same was expected;
        whether anything but sizes has changed.
        """
        kind, before = self.call.piece.kind, self.call.expected()
        like = [c for p in pieces if p.kind == kind for c in p.calls if c.expected() == before]
        return any([self.writes, *(c.expect(self.description, self.results) for c in like)])


class PieceCall:
    """One call of a piece in a forward, and what it is expected to give.

    ``stands``: tensors without memory in the place of its results, for the capture.
    """

    def __init__(
        self, piece: Piece, description: Any, results: Sequence[Tensor], given: Mapping[str, Tensor]
    ) -> None:
        self.piece, self.description = piece, description
        self.sizes = [_sizes(r, given) for r in results]
        self.varies = [{d for d, s in enumerate(sizes) if not isinstance(s, int)}
                       for sizes in self.sizes]  # fmt: skip
        self.stands = [_stand_in(r, r.shape, v, r.requires_grad)
                       for r, v in zip(results, self.varies, strict=True)]  # fmt: skip
        self.node = capture_stack.piece_call(self.run, piece.written)
        self.kept: Sequence[Tensor] | None = None
        self.after: RandomState | None = None
        self.left: list[tuple[Tensor, Tensor]] = []

    def expected(self) -> Any:
        """What is expected, as a value to compare."""
        return self.description, [_looks(s) for s in self.stands], self.sizes

    def begin(self, given: Mapping[str, Tensor]) -> None:
        """A call of the model with ``given`` begins."""
        self.end()
        for i, sizes in enumerate(self.sizes):
            stand = self.stands[i]
            shape = [s if isinstance(s, int) else _size(given, s, now)
                     for s, now in zip(sizes, stand.shape, strict=True)]  # fmt: skip
            if shape != list(stand.shape):
                self.stands[i] = _stand_in(stand, shape, self.varies[i], stand.requires_grad)

    def end(self) -> None:
        self.kept, self.after, self.left = None, None, []

    def expect(self, description: Any, results: Sequence[Tensor]) -> bool:
        """Whether anything but a size is other than it was expected."""
        same = description == self.description and len(results) == len(self.stands) and all(
            r.dtype == s.dtype and r.device == s.device and r.dim() == s.dim()
            and r.requires_grad <= s.requires_grad
            for r, s in zip(results, self.stands, strict=True)
        )  # fmt: skip
        if not same:
            self.description = description
            self.sizes = [list(r.shape) for r in results]
            self.varies = [set() for _ in results]
            self.stands = [_stand_in(r, r.shape, (), r.requires_grad) for r in results]
            return True
        for i, (r, stand) in enumerate(zip(results, self.stands, strict=True)):
            other = {d for d in range(r.dim()) if r.shape[d] != stand.shape[d]}
            if other:
                self.varies[i] |= other
                self.sizes[i] = [r.shape[d] if d in other else s
                                 for d, s in enumerate(self.sizes[i])]  # fmt: skip
                self.stands[i] = _stand_in(r, r.shape, self.varies[i], stand.requires_grad)
        return False

    def run(self, stands: Sequence[Tensor], args: Any, kwargs: Any) -> Sequence[Tensor]:
        """The results, where the captured graph runs.

        Raises:
            Again: they are not what the capture was made for.
        """
        if self.kept is not None and self.after is not None:
            self.after.restore()
            put_back(self.left)
            return self.kept
        results: list[Tensor] = []
        before = [(b, _compat.version(b)) for b in self.piece.module.buffers()]
        try:
            description = describe(self.piece.call(args, kwargs), results)
        except Exception as error:
            setattr(error, AS_IT_IS, True)
            raise
        fits = description == self.description and len(results) == len(self.stands) and all(
            r.shape == s.shape and r.dtype == s.dtype and r.device == s.device
            and r.requires_grad <= s.requires_grad
            for r, s in zip(results, self.stands, strict=True)
        )  # fmt: skip
        writes = self.piece.writes_to(b for b, was in before if _compat.version(b) != was)
        if not fits or self.piece.written or self.piece.changed:
            self.kept, self.after = results, RandomState.now(results)
            self.left = [(b, b.clone()) for b in self.piece.written]
        if not fits or writes:
            raise Again(self, description, results, writes)
        return results


class Piece:
    """Method ``name`` of a module, which runs whole.

    Attributes:
        kind: equal for methods that fail together.
        calls: its calls in a forward, in order.
        places: modules and names that hold the module, where a capture must not see its class.
        written: buffers that it changes; with any, it is not run twice in a call.
        saved_bytes, seconds: what autograd keeps of it, and the time of its forward, as recorded.
        changed: attributes of modules that it changes; with any, likewise.
        checkpointed: it keeps its arguments only, and runs again in the backward.
    """

    def __init__(
        self, module: nn.Module, path: str, name: str, kind: Any, reason: str,
        places: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:  # fmt: skip
        self.module, self.path, self.name, self.kind, self.reason = module, path, name, kind, reason
        self.places, self._shown = places, _classless(module) if places else module
        self.calls: list[PieceCall] = []
        self.at, self.told = 0, False
        self.written: list[Tensor] = []
        self.changed: set[Attribute] = set()
        self.checkpointed = False
        self.saved_bytes, self.seconds = 0, 0.0
        self._number = next(_NUMBERS)
        self._once, self._several = _once(self._number), _several(self._number)
        self.own: Any = None

    def __str__(self) -> str:
        return self.path if self.name == "forward" else f"{self.path}.{self.name}"

    @contextlib.contextmanager
    def replaced(self, by: Callable[..., Any]) -> Iterator[None]:
        """``by`` is called instead of the method."""
        own = vars(self.module).get(self.name)
        self.own = getattr(self.module, self.name)
        setattr(self.module, self.name, by)
        for owner, name in self.places:
            owner._modules[name] = self._shown
        self.at, CALLED[self._number] = 0, self
        try:
            yield
        finally:
            del CALLED[self._number]
            for owner, name in self.places:
                owner._modules[name] = self.module
            if own is None:
                delattr(self.module, self.name)
            else:
                setattr(self.module, self.name, own)

    @property
    def stub(self) -> Callable[..., Any]:
        """What a capture sees in the method's place."""
        return self._once if len(self.calls) == 1 else self._several

    def writes_to(self, buffers: Iterable[Tensor]) -> bool:
        """Note that it writes to these; whether that is new."""
        known = {id(b) for b in self.written}
        new = [b for b in buffers if id(b) not in known]
        self.written += new
        return bool(new)

    def call(self, args: Any, kwargs: Any) -> Any:
        args = self._learning(args)
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(
                self.own, *args, use_reentrant=False, context_fn=self._contexts, **kwargs
            )
        return self.own(*args, **kwargs)

    def _contexts(self) -> tuple[Any, Any]:
        """Of both runs; the second, in the backward, finds what the call of the model had set."""
        return contextlib.nullcontext(), self._as_in_a_call()

    @contextlib.contextmanager
    def _as_in_a_call(self) -> Iterator[None]:
        with streamable(self.module), carried_kernels(self.module):
            yield

    def _learning(self, args: Any) -> Any:
        """Something of ``args`` learns where the piece does: a checkpoint of the model's own may
        want that, and what asked for it may have been outside.
        """
        floating = [i for i, a in enumerate(args)
                    if isinstance(a, Tensor) and a.is_floating_point()]  # fmt: skip
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters())
        if not learns or not floating or any(args[i].requires_grad for i in floating):
            return args
        first = floating[0]
        return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])


class _Classless(nn.Module):
    """Holds all that another module holds, without its class."""


def _classless(module: nn.Module) -> nn.Module:
    made = _Classless.__new__(_Classless)
    object.__setattr__(made, "__dict__", vars(module))
    return made


CALLED: dict[int, Piece] = {}
"""Pieces of the calls under way. A capture reads them here: what it reads through a module of
torch.nn it takes for a weight, whose sizes are fixed."""
_NUMBERS = itertools.count()


def _once(number: int) -> Callable[..., Any]:
    def stub(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # inside another piece, which runs as it is
            return CALLED[number].own(*args, **kwargs)
        call = CALLED[number].calls[0]
        return rebuild(call.description, call.node(call.stands, args, kwargs))

    return stub


def _several(number: int) -> Callable[..., Any]:
    def stub(*args: Any, **kwargs: Any) -> Any:
        piece = CALLED[number]
        if not torch.compiler.is_dynamo_compiling():
            return piece.own(*args, **kwargs)
        call = piece.calls[piece.at]
        piece.at += 1
        return rebuild(call.description, call.node(call.stands, args, kwargs))

    return stub


def _stand_in(
    like: Tensor, shape: Sequence[int], varies: Any, requires_grad: bool
) -> Tensor:  # fmt: skip
    order = sorted(range(like.dim()), key=lambda d: like.stride(d), reverse=True)
    strides, step = [0] * like.dim(), 1
    for d in reversed(order):
        strides[d], step = step, step * max(int(shape[d]), 1)
    return capture_stack.stand_in(
        [int(s) for s in shape], strides, like.dtype, like.device, requires_grad,
        [d for d in varies if shape[d] > 1],
    )  # fmt: skip


def _looks(t: Tensor) -> Any:
    return tuple(t.shape), t.dtype, t.device, t.requires_grad


def _sizes(result: Tensor, given: Mapping[str, Tensor]) -> list[Size]:
    """Each size as one of the call, where it is equal to one now: of the same dimension first."""
    out: list[Size] = []
    for d, size in enumerate(result.shape):
        same = [(name, at) for name, t in given.items() for at, s in enumerate(t.shape)
                if s == size and size > 1]  # fmt: skip
        out.append(min(same, key=lambda key: (key[1] != d, key), default=size))
    return out


def _size(given: Mapping[str, Tensor], key: tuple[str, int], otherwise: int) -> int:
    value = given.get(key[0])
    return value.shape[key[1]] if value is not None and value.dim() > key[1] else otherwise


__all__ = ["Again", "Piece", "PieceCall"]
