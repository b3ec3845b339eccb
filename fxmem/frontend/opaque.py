"""Pieces of a model that run whole, as they are, because they cannot be captured.

What fails in a capture (a size or a branch that depends on values, a loop over the length, a
function of another library) lies in some method of some module. The innermost such method, of every
module of that kind, becomes a *piece*: the capture takes its results as inputs and its call as one
call, at which the graph is cut into regions, and between the regions the method runs under plain
autograd. Sizes of the results must be known before it runs. They are guessed from the sizes of the
call and from what came before; where a guess is wrong, the call starts again with what is known now
and keeps the results that are there. So a wrong guess costs time, never a result.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import capture_stack, fixed_sizes
from fxmem._compat import errors as dynamo
from fxmem.errors import CaptureError, FxmemError, FxmemWarning, PlanError
from fxmem.frontend import faults
from fxmem.frontend.attributes import put_back, read
from fxmem.frontend.functional_writes import undoable
from fxmem.frontend.methods import Method, called_at, method_of, methods_at, methods_on
from fxmem.frontend.origin import Line
from fxmem.frontend.piece import Again, Piece
from fxmem.frontend.random_state import RandomState
from fxmem.frontend.recording import Recording
from fxmem.frontend.stateful import Stateful, places

KINDS = 16
"""Kinds of pieces of one model before its error is the user's to see."""
TRIES = 64
"""Wrong guesses in one call before it is given up."""
_LAYERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Opaque:
    """The pieces of one model. ``version`` counts their changes: no capture survives one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pieces: list[Piece] = []
        self.stateful: dict[CodeType, list[Stateful]] = {}
        """Functions that hand a state from chunk to chunk, by their code."""
        self.version = 0
        self._any_length = True
        """The code must not need the length as a number, until nothing can be done about it."""
        self._recorded = False
        self._read: Piece | None = None

    def check(self, sources: Sequence[str]) -> None:
        """
        Raises:
            CaptureError: what is captured around a piece reads what the piece changes: the capture
                has it as it was before the call. ``sources``: Dynamo's names of what it reads.
        """
        for piece in (p for p in self.pieces if p.calls):
            for path, name in sorted(a for a in piece.changed if read(a, sources)):
                self._read = piece
                raise CaptureError(
                    f"{piece}, which runs as it is, changes `{name}` of {path or 'the model'}, and "
                    "what is captured around it reads that",
                    advice="return the value instead, or transform a part of the model without it",
                )

    def found(
        self, error: BaseException, again: Callable[[], Any], given: Mapping[str, Tensor],
        most: bool = True,
    ) -> bool:  # fmt: skip
        """Whether a call that failed with ``error`` may succeed now.

        ``again``: the same call in plain PyTorch; ``given``: its tensors, by name. ``most``: a
        piece may be what holds most of the model, in layers.
        """
        if not _by_capture(error):
            return False
        if self.pieces and not self._recorded:
            # a call of another sort, in which pieces are called otherwise than in those before
            return self._record(again, given)
        if fixed_sizes.demanded() and self._carried(error, again, given):
            return True
        reason = self._reason(error)
        if len({p.kind for p in self.pieces}) < KINDS:
            methods, refused = self._methods(error, again, given)
            for method in methods:
                if not most and method[1] == "forward" and self._is_most(method[0]):
                    continue
                before = self.pieces
                self.pieces = _with(before, self.model, method, reason, refused)
                if self._record(again, given):
                    return True
                self.pieces = before
        fixed = self._any_length and fixed_sizes.demanded()
        self._any_length &= not fixed
        return fixed

    def _is_most(self, module: nn.Module) -> bool:
        own, every = (sum(p.numel() for p in m.parameters()) for m in (module, self.model))
        return 2 * own > every and any(isinstance(m, _LAYERS) for m in module.modules())

    def _carried(
        self, error: BaseException, again: Callable[[], Any], given: Mapping[str, Tensor]
    ) -> bool:
        """Whether a function in which the capture failed hands a state on, which was not known."""
        for code, found in places(capture_stack.callers(error), self.model):
            found = self.stateful.setdefault(code, found)
            with contextlib.ExitStack() as stack:
                for one in found:
                    stack.enter_context(one.replaced(one.record))
                if not self._record(again, given):
                    return False
            (length,) = _lengths(given) or {0}
            if any([one.learn(length) for one in found]):
                self.version += 1
                return True
        return False

    def _methods(
        self, error: BaseException, again: Callable[[], Any], given: Mapping[str, Tensor]
    ) -> tuple[list[Method], bool]:
        """Methods of submodules in which the capture failed, innermost first; or, and True, those
        that the model's own code calls there: Dynamo does not enter some classes, such as a
        recurrent network's or a script's.
        """
        piece, self._read = self._read, None
        if piece is not None:
            found = _around(self.model, piece)
        else:
            inside = set(self.model.modules()) - {self.model}
            raised = [Line(f.filename, f.lineno, f.name) for f in dynamo.raised_at(error)]
            found = methods_on(raised, self.model) or [
                (owner, name) for owner, code in capture_stack.callers(error)
                if isinstance(owner, nn.Module) and owner in inside
                and (name := method_of(owner, code))
            ]  # fmt: skip
            node = None if found else faults.node_of(dynamo.backend_error(error) or error)
            found += methods_at(node, self.model) if node is not None else []
        known = {(self.model, "forward"), *((p.module, p.name) for p in self.pieces)}
        if methods := [m for m in dict.fromkeys(found) if m not in known]:
            return methods, False
        if stack := dynamo.captured_stack(error):
            with (
                contextlib.suppress(Exception),  # what plain PyTorch raises too
                Recording(self.model, [], given), called_at(stack[-1]) as modules,
            ):  # fmt: skip
                again()
                # others may be called by the same line
                modules.sort(key=lambda m: not capture_stack.is_never_entered(m))
                found = [(module, "forward") for module in modules]
        return [m for m in found if m not in known], True

    def _reason(self, error: BaseException) -> str:
        if fixed_sizes.demanded():
            return "its code needs the length as a number, as a loop over it does"
        named = faults.of_call(error, self.model, None) if isinstance(error, Exception) else error
        text = named.what if isinstance(named, FxmemError) else str(named).split("\n")[0]
        place = f" at {named.source}" if isinstance(named, FxmemError) and named.source else ""
        if isinstance(named, CaptureError):
            text = text.removeprefix(f"{type(self.model).__name__} cannot be captured: ")
        return text + place

    def _record(self, again: Callable[[], Any], given: Mapping[str, Tensor]) -> bool:
        """Run the call once as it is, to see what the pieces give."""
        self._recorded = True
        try:
            with Recording(self.model, self.pieces, given) as recording:
                again()
        except Exception:
            return False  # what plain PyTorch raises too, or a method that cannot be a piece
        self.version += recording.changed()
        return True

    def run(
        self, call: Callable[[], Any], given: Mapping[str, Tensor], take_back: Callable[[], None]
    ) -> Any:
        """``call()``, which runs captured code, with the pieces in place.

        ``given``: the tensors of the model's call, by name. ``take_back``: what code around the
        pieces has done meanwhile, beside captured code.
        """
        with fixed_sizes.keep_symbolic(_lengths(given) if self._any_length else set()):
            if not self.pieces:
                with self._stubs():
                    return call()
            calls = [c for piece in self.pieces for c in piece.calls]
            for one in calls:
                one.begin(given)
            try:
                return self._run(call, RandomState.now(given.values()), take_back)
            finally:
                for one in calls:
                    one.end()

    def _run(
        self, call: Callable[[], Any], random: RandomState, take_back: Callable[[], None]
    ) -> Any:
        written = [(b, b.clone()) for p in self.pieces if p.calls for b in p.written]
        for _ in range(TRIES):
            with undoable() as undo:
                try:
                    with self._stubs():
                        result = call()
                except Again as other:
                    self.version += other.learn(self.pieces)
                    undo()
                    put_back(written)
                    take_back()
                    random.restore()
                    continue
            self._recorded = False
            self._tell()
            return result
        raise PlanError(
            f"{self.pieces[0]} gives results of other sizes at every try",
            advice="transform a part of the model that is called with tensors of known sizes",
        )

    @contextlib.contextmanager
    def _stubs(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in (s for found in self.stateful.values() for s in found if s.forms):
                self.version += one.outdated()
                stack.enter_context(one.replaced(one.stub))
            for piece in self.pieces:
                if piece.calls:
                    stack.enter_context(piece.replaced(piece.stub))
            yield

    def _tell(self) -> None:
        """Say, once, what runs whole."""
        for kind in dict.fromkeys(p.kind for p in self.pieces if p.calls and not p.told):
            like = [p for p in self.pieces if p.kind == kind and p.calls]
            more = f" and {len(like) - 1} more like it" if len(like) > 1 else ""
            warnings.warn(
                f"{like[0]}{more} runs whole, as it is; everything around it streams: "
                f"{like[0].reason}", FxmemWarning, stacklevel=2,
            )  # fmt: skip
            for piece in like:
                piece.told = True


def _with(
    pieces: list[Piece], model: nn.Module, method: Method, reason: str, refused: bool
) -> list[Piece]:
    """``pieces`` with ``method``, of every module of its kind, and without those inside these.

    ``refused``: Dynamo does not take modules of this class at all.
    """
    module, name = method
    kind = _kind(module, name)
    like = [(path, m) for path, m in model.named_modules() if path and _kind(m, name) == kind]
    new = [
        Piece(m, path, name, kind, reason, list(_places(model, m)) if refused else ())
        for path, m in like
    ]
    if name != "forward":
        return [*pieces, *new]
    nested = {m for _, one in like for m in one.modules() if m is not one}
    covered = nested | {m for _, m in like}
    kept = [p for p in pieces if p.module not in covered]
    return [*kept, *(p for p in new if p.module not in nested)]


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for owner in model.modules():
        yield from ((owner, name) for name, held in owner._modules.items() if held is module)


def _around(model: nn.Module, piece: Piece) -> list[Method]:
    """The forwards around a piece, innermost first."""
    path = piece.path.split(".")
    owners = [model.get_submodule(".".join(path[:i])) for i in range(len(path), 0, -1)]
    return [(m, "forward") for m in owners if type(m).forward is not nn.Module.forward]


def _kind(module: nn.Module, name: str) -> Any:
    """Equal for methods that run the same code on tensors of the same classes."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return type(module), name, tuple((n, type(p.data)) for n, p in named)


def _by_capture(error: BaseException) -> bool:
    """The model could not be captured or compiled, which running a part as it is may cure."""
    inner = dynamo.backend_error(error) or error
    if isinstance(inner, FxmemError):
        return not inner.by_plan
    known = isinstance(inner, (MemoryError, torch.OutOfMemoryError)) or dynamo.over_limit(error)
    return dynamo.while_capturing(error) and not known


def _lengths(given: Mapping[str, Tensor]) -> set[int]:
    """What the streamed size seems to be: the longest of ids ``[B, T]``, states ``[B, T, d]``."""
    found = [t.shape[-1] for t in given.values() if t.dim() in (1, 2) and not t.is_floating_point()]
    found += [t.shape[-2] for t in given.values() if t.dim() == 3 and t.is_floating_point()]
    return {s for s in [max(found, default=0)] if s > 1}


__all__ = ["Opaque"]
