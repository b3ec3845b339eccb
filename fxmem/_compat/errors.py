"""Private names of torch for failures: what Dynamo raises, and what it knows about the place."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._C import _LinAlgError as LinAlgError  # type: ignore[attr-defined]
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    RestartAnalysis,
    TorchDynamoException,
    TorchRuntimeError,
    Unsupported,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _StopRecomputationError as StopRecomputation

from fxmem._compat.data_sizes import by_data

__all__ = [
    "GuardOnDataDependentSymNode", "LinAlgError", "RestartAnalysis", "StopRecomputation",
    "backend_error", "captured_stack", "frames", "from_collective", "is_user_exception",
    "kind_and_reason", "module_source", "over_limit", "raised_at", "recompile_reason",
    "sized_by_data", "while_capturing",
]  # fmt: skip


def frames(error: BaseException) -> Iterator[FrameType]:
    """Frames that an error and its causes went through, outermost first for each."""
    seen: BaseException | None = error
    while seen is not None:
        for frame, _ in traceback.walk_tb(seen.__traceback__):
            yield frame
        seen = seen.__cause__


def while_capturing(error: BaseException) -> bool:
    """The error arose while Dynamo captured a frame or called the backend, not when it ran."""
    if isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit)):
        return True
    files = [frame.f_code.co_filename.replace("\\", "/") for frame in frames(error)]
    return bool(files) and (
        any(file.endswith("_dynamo/convert_frame.py") for file in files)
        or "torch/_dynamo/" in files[-1]
    )


def backend_error(error: BaseException) -> BaseException | None:
    """What the backend raised, where that is what failed."""
    return error.inner_exception if isinstance(error, BackendCompilerFailed) else None


def sized_by_data(node: fx.Node) -> bool:
    """Some size that the node takes, or that its result has, is the value of a tensor."""
    found = [n.meta.get("example_value", n.meta.get("val")) for n in (node, *node.all_input_nodes)]
    return any(by_data(leaf) for value in found for leaf in tree_leaves(value))


def over_limit(error: BaseException) -> bool:
    """The frame has been captured as often as it may be."""
    return isinstance(error, FailOnRecompileLimitHit)


def recompile_reason(error: BaseException) -> str | None:
    """The guard that failed, for :func:`over_limit`."""
    found = [f.f_locals.get("recompile_reason") for f in frames(error)]
    texts = [t for t in found if isinstance(t, str)]
    return texts[-1].split(": ", 1)[-1].split("\n")[0] if texts else None


def from_collective(error: BaseException) -> bool:
    """What processes send one another failed. Gloo's errors have no type, and name its file."""
    kind = getattr(torch.distributed, "DistError", ())
    return isinstance(error, kind) or (
        isinstance(error, RuntimeError) and "gloo/transport/" in str(error)
    )


def is_user_exception(error: BaseException) -> bool:
    """The captured code raised an exception, or an op of it did: plain PyTorch may do so too."""
    if isinstance(error, Unsupported):
        kind = str(error.gb_type or "")
        return kind.startswith("Observed exception") or "making fake tensor call" in kind
    return isinstance(error, TorchRuntimeError) or not isinstance(error, TorchDynamoException)


def kind_and_reason(error: BaseException) -> tuple[str, str]:
    """Dynamo's name for what it cannot capture, and its first sentence about why."""
    text = str(error).split("\nfrom user code")[0].strip()
    head, _, rest = text.partition("\n")
    why = rest.partition("Explanation:")[2].split("\n  Hint:")[0].split("\n  Developer")[0]
    why = why.strip().split("\n\n")[0]
    if "Observed exception" in head:
        context = text.partition("Developer debug context:")[2].strip().split("\n")[0]
        return "it raises an exception while captured", context.removeprefix("raised exception ")
    return head.strip().rstrip("."), " ".join(why.split())


def captured_stack(error: BaseException) -> list[Any]:
    """``traceback.FrameSummary`` of the captured code where it failed, outermost first."""
    if raised := raised_at(error):
        return raised
    seen: BaseException | None = error
    while seen is not None:
        if stack := getattr(seen, "real_stack", None):
            return list(stack)
        seen = seen.__cause__
    return []


def raised_at(error: BaseException) -> list[Any]:
    """``traceback.FrameSummary`` of where captured code raised what nothing caught, outermost
    first: Dynamo's own stack ends at the last ``finally`` that it passed.
    """
    for value in (v for frame in frames(error) for v in frame.f_locals.values()):
        found: Any = getattr(
            value, "__traceback__", None
        )  # Dynamo's own, of an exception of the code
        if type(found).__name__ == "TracebackVariable":  # by name: versions have it in other places
            return [getattr(f, "frame_summary", f) for f in found.extract_tb()]
    return []


def module_source(error: BaseException) -> str | None:
    """Dynamo's name for the innermost module that was being captured; see ``origin.path_of``."""
    found = None
    for frame in frames(error):
        stack = getattr(frame.f_locals.get("self"), "nn_module_stack", None)
        if isinstance(stack, dict) and stack:
            found = str(list(stack.values())[-1][0])
    return found
