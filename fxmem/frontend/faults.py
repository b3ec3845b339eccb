"""The border of the library: what fails inside it leaves as an error with a name.

A failure has one of three causes. The user's own code raises, in plain PyTorch too: that exception
leaves as itself. The model has something that cannot be captured: :class:`CaptureError`. The
compiler fails: :class:`InternalError`. Exhausted memory and interrupts always leave as themselves.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxmem._compat import errors as dynamo
from fxmem._compat import hooks as _compat_hooks
from fxmem.errors import CaptureError, FxmemError, HookError, InternalError, LostRankError
from fxmem.frontend.attributes import held_values, put_back
from fxmem.frontend.origin import Line, is_own, module_path, name_of, path_of, place, stack_of

LONGEST = 200
"""Characters of another library's text that go into a message."""
_BY_VALUES = ("out of bounds", "out of range", "assertion failed", "probability tensor")
AS_IT_IS = "_fxmem_as_it_is"
"""An attribute of errors that code of the model's own has raised, in a piece that runs as it is."""
# a warning that is an error by the user's filter; the last ends a checkpoint's second run
_PASSING = (
    FxmemError, MemoryError, torch.OutOfMemoryError, Warning, dynamo.StopRecomputation
)  # fmt: skip


def compiler_fault(error: Exception, doing: str) -> Exception:
    """What leaves the compiler in place of an error that arose in it while ``doing``."""
    if isinstance(error, _PASSING):
        return error
    node = node_of(error)
    where = {} if node is None else _where(node)
    text = f"{type(error).__name__}: {_short(str(error))}"
    by_data = node is not None and dynamo.sized_by_data(node)
    if by_data or isinstance(error, dynamo.GuardOnDataDependentSymNode):
        named: FxmemError = CaptureError(
            "a size or a branch depends on the values of a tensor", reason=text, **where
        )
    else:
        named = InternalError(f"{doing} failed with {text}", **where)
    return named.with_traceback(None)


@contextlib.contextmanager
def running(what: str, modules: str = "") -> Iterator[None]:
    """Names the faults of generated code; what a callback of the user's raises leaves as itself."""
    try:
        yield
    except Exception as error:
        if isinstance(error, _PASSING) or _from_user(error) or getattr(error, AS_IT_IS, False):
            raise
        if (gone := lost(error)) is not None:
            raise gone from error
        text = f"{type(error).__name__}: {_short(str(error))}"
        raise InternalError(f"{what} failed with {text}", module=modules or None) from error


def lost(error: BaseException) -> LostRankError | None:
    """What leaves in place of the failure of a collective."""
    if not dynamo.from_collective(error):
        return None
    return LostRankError(f"what ranks send one another failed: {_short(str(error))}")


def of_run(error: InternalError, plain: Callable[[], Any]) -> Exception:
    """What leaves a compiled forward in place of ``error``: what plain PyTorch raises for these
    values, where the values may be to blame (an index beyond the vocabulary)."""
    cause = error.__cause__
    by_values = isinstance(cause, (IndexError, dynamo.LinAlgError)) or any(
        text in str(cause) for text in _BY_VALUES
    )
    return (_raised_by(plain) if by_values else None) or error


def _from_user(error: Exception) -> bool:
    *_, last = dynamo.frames(error)
    file = last.f_code.co_filename
    return Line(file, 0, "").library is None and not file.startswith("<")


def of_call(error: Exception, model: nn.Module, plain: Callable[[], Any] | None) -> Exception:
    """What leaves a call of a transformed model in place of ``error``.

    ``plain``: the same call in plain PyTorch; run, without gradients, where the model itself may be
    what raised. None: it would wait for other processes.
    """
    if (gone := lost(error)) is not None:
        return gone
    if isinstance(error, FxmemError) or not dynamo.while_capturing(error):
        return error
    name = type(model).__name__
    if (inner := dynamo.backend_error(error)) is not None and isinstance(inner, Exception):
        return _with_way_out(compiler_fault(inner, f"compiling {name}"), model)
    if dynamo.over_limit(error):
        return CaptureError(
            f"{name} needs another capture, and has been captured too often",
            reason=_short(dynamo.recompile_reason(error) or ""),
            advice="keep what the reason names the same from step to step, or give it as a "
            "tensor; fxmem.transform(model, plan) anew starts from no captures",
        )
    if plain is not None and dynamo.is_user_exception(error):
        own = _raised_by(plain, model)
        if own is not None:
            return own
    if _compat_hooks.has_old_hooks(model):
        return HookError(
            "a hook by register_backward_hook, which sees the last op of a module only",
            advice="use register_full_backward_hook",
        )
    return _capture_error(error, model)


def _capture_error(error: Exception, model: nn.Module) -> CaptureError:
    kind, reason = dynamo.kind_and_reason(error)
    line = place([
        Line(f.filename, f.lineno or 0, f.name, (f.line or "").strip())
        for f in dynamo.captured_stack(error)
    ])  # fmt: skip
    source = dynamo.module_source(error)
    path = None if source is None else path_of(source)
    if path is not None and not hasattr(model, path.partition(".")[0]):
        path = path.partition(".")[2] or None  # Dynamo's name of the model itself
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {_short(kind)}", reason=_short(reason),
        module=path, source=None if line is None else str(line), advice=_advice(model, path, line),
    )  # fmt: skip


def _advice(model: nn.Module, path: str | None, line: Line | None) -> str | None:
    other = _without(model, path)
    part = "" if other is None else f"transform a part without it, fxmem.transform(model.{other})"
    if line is None or line.library is None:
        rewrite = "rewrite the named line so that torch.compile(fullgraph=True) accepts it"
        return f"{rewrite}, or {part or 'do not transform this model'}"
    return part or (
        f"the line belongs to {line.library}: train this model without Stream, or use another "
        "version or implementation of that module"
    )


def _with_way_out(error: Exception, model: nn.Module) -> Exception:
    """Advice that can be followed: nobody rewrites a line of an installed library."""
    library = re.match(r'File "([^/"]+)/', getattr(error, "source", None) or "")
    if isinstance(error, FxmemError) and library is not None and error.module is not None:
        other = _without(model, error.module)
        way = f"fxmem.transform(model.{other})" if other else "train this model without Stream"
        error.advice = f"{error.advice}; where {library[1]} cannot be changed: {way}"
    return error


def _without(model: nn.Module, path: str | None) -> str | None:
    """The largest submodule that does not contain ``path``, if it has most of the parameters."""
    if not path:
        return None
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if name and not (path + ".").startswith(name + ".") and not name.startswith(path + ".")
        and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    best = max(sizes, key=lambda name: sizes[name], default=None)
    return best if best is not None and 2 * sizes[best] > total else None


def _raised_by(plain: Callable[[], Any], model: nn.Module | None = None) -> Exception | None:
    """The exception of the plain call; buffers and random state are afterwards as before."""
    held = [] if model is None else held_values(model)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            plain()
        except Exception as error:
            return error
        finally:
            put_back(held)
    return None


def node_of(error: BaseException) -> fx.Node | None:
    """The operator that the compiler was at: the innermost one that a frame of fxmem holds."""
    for frame in reversed(list(dynamo.frames(error))):
        if is_own(frame.f_code.co_filename):
            for value in frame.f_locals.values():
                if isinstance(value, fx.Node) and stack_of(value):
                    return value
    return None


def _where(node: fx.Node) -> dict[str, str | None]:
    line = place(stack_of(node))
    return {
        "op": name_of(node.target), "module": module_path(node),
        "source": None if line is None else str(line),
    }  # fmt: skip


def _short(text: str) -> str:
    line = " ".join(text.strip().split("\n\n")[0].split())
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


__all__ = ["compiler_fault", "lost", "of_call", "of_run", "running"]
