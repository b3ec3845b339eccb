"""Pieces of a model that run whole, as they are, because they cannot be captured.

What fails in a capture (a size or a branch that depends on values, a loop over the length, a
function of another library) lies in some method of some module. The innermost such method, of every
module of that kind, becomes a *piece*: the capture takes its results as inputs and its call as one
call, at which the graph is cut into regions, and between the regions the method runs under plain
autograd. Sizes of the results must be known before it runs. They are guessed from the sizes of the
call and from what came before; where a guess is wrong, the call starts again with what is known now
and keeps the results that are there. So a guess costs time when it is wrong, never a result.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import capture_stack
from fxmem._compat import errors as dynamo
from fxmem.errors import CaptureError, FxmemError, FxmemWarning, PlanError, RoleError
from fxmem.frontend import faults
from fxmem.frontend.origin import Line, module_path, stack_of
from fxmem.frontend.piece import Again, Piece, PieceCall, Recording
from fxmem.frontend.random_state import RandomState

KINDS = 16
"""Kinds of pieces of one model before its error is the user's to see."""
TRIES = 64
"""Wrong guesses in one call before it is given up."""


class Opaque:
    """The pieces of one model. ``version`` counts their changes: no capture survives one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pieces: list[Piece] = []
        self.version = 0
        self._loops, self._recorded = True, False

    def found(
        self, error: BaseException, again: Callable[[], Any], given: Mapping[str, Tensor]
    ) -> bool:
        """Whether a call that failed with ``error`` may succeed now.

        ``again``: the same call in plain PyTorch.
        """
        if not _by_capture(error):
            return False
        if self.pieces and not self._recorded:
            return self._record(again, given)  # an input of another kind: a piece is called otherwise
        places = [p for p in self._places(error) if not self._covered(*p)]
        for module, name in places if len({p.kind for p in self.pieces}) < KINDS else ():
            before = self.pieces
            self._add(module, name, error)
            if self._record(again, given):
                return True
            self.pieces = before
        fixed = self._loops and capture_stack.demanded()
        self._loops &= not fixed
        return fixed

    def _places(self, error: BaseException) -> list[tuple[nn.Module, str]]:
        """Methods of submodules in which the capture failed, innermost first."""
        inside = {id(m): m for m in self.model.modules() if m is not self.model}
        found = [
            (inside[id(owner)], name)
            for owner, code in capture_stack.callers(error)
            if id(owner) in inside and (name := _method(inside[id(owner)], code)) is not None
        ]
        node = None if found else faults.node_of(dynamo.backend_error(error) or error)
        if node is not None:
            for line in reversed(stack_of(node)):
                found += next(([(m, name)] for m in inside.values() if (name := _at(m, line))), [])
            # the lines of torch's own modules are not among them
            last = _submodule(self.model, module_path(node))
            if last is not None and (not found or last in _within(found[0][0])):
                found.insert(0, (last, "forward"))
        return list(dict.fromkeys(found))

    def _covered(self, module: nn.Module, name: str) -> bool:
        return any(p.module is module and p.name in (name, "forward") for p in self.pieces)

    def _add(self, module: nn.Module, name: str, error: BaseException) -> None:
        kind, reason = _kind(module, name), _reason(error, self.model)
        names = {m: n for n, m in self.model.named_modules()}
        like = [m for m in names if m is not self.model and _kind(m, name) == kind]
        new = [Piece(m, names[m], name, kind, reason) for m in like]
        inside = {id(m) for p in new for m in p.module.modules() if m is not p.module}
        kept = [p for p in self.pieces
                if id(p.module) not in inside and not any(p.module is n.module for n in new)]  # fmt: skip
        self.pieces = [*kept, *(p for p in new if id(p.module) not in inside)]

    def _record(self, again: Callable[[], Any], given: Mapping[str, Tensor]) -> bool:
        """Run the call once as it is, to see what the pieces give."""
        self._recorded = True
        try:
            with Recording(self.model, self.pieces, given) as recording:
                again()
        except Exception:
            return False
        if recording.changed():
            self.version += 1
        return True

    def _tell(self) -> None:
        """Say, once, what runs whole."""
        for kind in dict.fromkeys(p.kind for p in self.pieces if not p.told):
            like = [p for p in self.pieces if p.kind == kind and p.calls]
            if like:
                more = f" and {len(like) - 1} more like it" if len(like) > 1 else ""
                warnings.warn(
                    f"{like[0]} runs whole, as it is{more}; everything around it streams: "
                    f"{like[0].reason}", FxmemWarning, stacklevel=2,
                )  # fmt: skip
                for piece in like:
                    piece.told = True

    def run(self, call: Callable[[], Any], given: Mapping[str, Tensor]) -> Any:
        """``call()``, which runs captured code, with the pieces in place.

        ``given``: the tensors of the model's call, by name.
        """
        with capture_stack.keep_symbolic(_lengths(given) if self._loops else set()):
            if not self.pieces:
                return call()
            made = [c for piece in self.pieces for c in piece.calls]
            for one in made:
                one.begin(given)
            try:
                return self._run(call, RandomState.now(given.values()))
            finally:
                for one in made:
                    one.end()

    def _run(self, call: Callable[[], Any], random: RandomState) -> Any:
        for _ in range(TRIES):
            try:
                with self._stubs():
                    result = call()
            except Again as other:
                self.version += other.learn(self.pieces)
                random.restore()
                continue
            self._recorded = False
            self._tell()
            return result
        raise PlanError(
            f"sizes that {self.pieces[0]} gives are others at every try",
            advice="transform a part of the model that is called with fixed sizes",
        )

    @contextlib.contextmanager
    def _stubs(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for piece in self.pieces:
                if piece.calls:
                    stack.enter_context(piece.replaced(piece.stub()))
            yield


def _by_capture(error: BaseException) -> bool:
    """The model could not be captured or compiled, which running a part as it is may cure."""
    inner = dynamo.backend_error(error) or error
    if isinstance(inner, FxmemError):
        return not isinstance(inner, (PlanError, RoleError))
    known = isinstance(inner, (MemoryError, torch.OutOfMemoryError)) or dynamo.over_limit(error)
    return dynamo.while_capturing(error) and not known


def _method(module: nn.Module, code: CodeType) -> str | None:
    """The method of ``module`` that runs ``code``, decorated or not."""
    for names in (vars(module), *(vars(c) for c in type(module).__mro__ if c is not nn.Module)):
        for name, value in names.items():
            if callable(value) and code in _codes(value):
                return name
    return None


def _codes(function: Any) -> Iterator[CodeType]:
    while function is not None:
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            yield code
        function = getattr(function, "__wrapped__", None)


def _kind(module: nn.Module, name: str) -> Any:
    """Equal for methods that run the same code on tensors of the same classes."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return type(module), name, tuple((n, type(p.data)) for n, p in named)


def _submodule(model: nn.Module, path: str | None) -> nn.Module | None:
    """The module of a path, which may begin with a name for ``model`` itself."""
    known = dict(model.named_modules())
    while path and path not in known:
        path = path.partition(".")[2]
    return known[path] if path else None


def _within(module: nn.Module) -> set[nn.Module]:
    return set(module.modules()) - {module}


def _at(module: nn.Module, line: Line) -> str | None:
    """The method of ``module`` that a line of a call stack belongs to."""
    for cls in type(module).__mro__:
        for name, value in vars(cls).items() if cls is not nn.Module else ():
            for code in _codes(value):
                if code.co_filename == line.file and code.co_name == line.function:
                    last = max(at or 0 for *_, at in code.co_lines())
                    if code.co_firstlineno <= line.number <= last:
                        return name
    return None


def _reason(error: BaseException, model: nn.Module) -> str:
    if capture_stack.demanded():
        return "its code needs the length as a number, as a loop over it does"
    named = faults.of_call(error, model, None) if isinstance(error, Exception) else error
    if isinstance(named, CaptureError):
        return f"{named.what}; {named.reason}" if named.reason else named.what
    return named.what if isinstance(named, FxmemError) else str(named).split("\n")[0]


def _lengths(given: Mapping[str, Tensor]) -> set[int]:
    """Sizes that may be the streamed one: of ids ``[B, T]`` and of states ``[B, T, d]``."""
    found = [t.shape[-1] for t in given.values() if t.dim() in (1, 2) and not t.is_floating_point()]
    found += [t.shape[-2] for t in given.values() if t.dim() == 3 and t.is_floating_point()]
    return {s for s in found if s > 1}


__all__ = ["Opaque"]
