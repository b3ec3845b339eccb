"""Private names of torch for pieces of a model that run as they are: where Dynamo was when it gave
up, and calls that it takes into its graph without looking inside.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import LazyVariableTracker, UnspecializedNNModuleVariable
from torch._guards import TracingContext, detect_fake_mode

from fxmem._compat.errors import frames
from fxmem._compat.varying import STAND_IN

__all__ = [
    "callers", "dynamic_sources", "is_held", "is_never_entered", "is_piece", "is_stand_in",
    "piece_call", "sources", "stand_in", "written",
]  # fmt: skip

_PIECE = "_fxmem_piece"


def callers(error: BaseException) -> list[tuple[Any, CodeType]]:
    """Code that Dynamo was in when ``error`` arose, innermost first, each with the object that is
    its first argument.
    """
    found = [
        tx for e in _causes(error) for frame in frames(e)
        if isinstance(tx := frame.f_locals.get("self"), InstructionTranslatorBase)
    ]  # fmt: skip
    stacks = [list(_outward(tx)) for tx in found]
    deepest = max(stacks, key=len, default=[])
    return [(_first_argument(tx), tx.f_code) for tx in deepest]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``raise ... from None`` hides the context, which still knows the place."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _outward(tx: Any) -> Iterator[Any]:
    while tx is not None:
        yield tx
        tx = getattr(tx, "parent", None)


def _first_argument(tx: Any) -> Any:
    names = tx.f_code.co_varnames
    variable = tx.symbolic_locals.get(names[0]) if names else None
    if isinstance(variable, LazyVariableTracker):
        return variable.peek_value() if not variable.is_realized() else _value(variable.realize())
    return _value(variable)


def _value(variable: Any) -> Any:
    return variable.value if isinstance(variable, UnspecializedNNModuleVariable) else None


def is_never_entered(module: torch.nn.Module) -> bool:
    """Dynamo takes no module of this class, whatever its code."""
    disabled = getattr(type(module).forward, "_torchdynamo_disable", False)
    return bool(disabled) or isinstance(module, (torch.nn.RNNBase, torch.jit.ScriptModule))


def piece_call(
    run: Callable[[Sequence[Any], Any, Any], Sequence[torch.Tensor]],
    written: Sequence[torch.Tensor] = (),
) -> Callable[..., Any]:
    """``fn(stand_ins, args, kwargs) -> tensors`` as one call of a captured graph: its results are
    like the stand-ins there; ``run`` makes them where the graph runs. ``written``: tensors that it
    writes to.
    """

    def _fxmem_piece(stand_ins: Sequence[torch.Tensor], args: Any, kwargs: Any) -> tuple[Any, ...]:
        if detect_fake_mode(stand_ins) is not None:
            return tuple(s.clone() for s in stand_ins)
        return tuple(run(stand_ins, args, kwargs))

    vars(_fxmem_piece)["written"] = written
    return torch.compiler.allow_in_graph(_fxmem_piece)


def is_piece(node: fx.Node) -> bool:
    """The node is a :func:`piece_call`."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == _PIECE


def dynamic_sources(patterns: Iterable[str]) -> contextlib.AbstractContextManager[Any]:
    """Captures meanwhile take numbers as symbols where Dynamo's name of them matches a pattern."""
    config: Any = torch.compiler.config
    given = [p for p in config.dynamic_sources.split(",") if p]
    found: contextlib.AbstractContextManager[Any]
    found = config.patch(dynamic_sources=",".join([*given, *patterns]))
    return found


def is_held(node: fx.Node) -> bool:
    """An input of a graph, no parameter, that a module holds: a buffer, or another attribute."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None or isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return False
    kind = source.guard_source
    return bool(kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module())


def sources() -> list[str]:
    """Names of what the capture under way depends on, as Dynamo has them:
    ``L['self']._modules['layers']._modules['0'].scale``.
    """
    context = TracingContext.try_get()
    if context is None:
        return []
    return [guard.originating_source.name for guard in context.guards_context.dynamo_guards]


def written(nodes: Iterable[fx.Node]) -> list[torch.Tensor]:
    """What the pieces among ``nodes`` write to."""
    return [t for n in nodes if is_piece(n) for t in vars(n.target).get("written", ())]


def stand_in(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device,
    requires_grad: bool, varying: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """A tensor without memory; the dimensions ``varying`` are symbolic in a capture."""
    made = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)
    if shape or not dtype.is_floating_point:
        made.untyped_storage().resize_(0)
    else:  # a capture reads single numbers, and takes all but this one for known
        made.fill_(math.nan)
    for d in varying:
        torch._dynamo.maybe_mark_dynamic(made, d)
    setattr(made, STAND_IN, True)
    return made.requires_grad_(requires_grad)


def is_stand_in(tensor: torch.Tensor) -> bool:
    """It was made by :func:`stand_in`."""
    return hasattr(tensor, STAND_IN)
