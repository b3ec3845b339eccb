"""Private names of torch for traces: ATen graphs of functions, with decompositions."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing as nothing_saved
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fxmem._compat.graph import is_mutable

__all__ = [
    "ends_early", "functional", "inside_transform", "make_fx", "nothing_saved", "on_capture",
    "operator_named", "restart_capture", "traced",
]  # fmt: skip


def inside_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) or forward-mode differentiation runs."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def restart_capture(reason: str) -> None:
    """Ask Dynamo to trace the frame again, with what has been marked dynamic since; where it was
    about to break the graph, it finds out anew.
    """
    InstructionTranslator.current_tx().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def ends_early(gm: fx.GraphModule) -> bool:
    """A graph as Dynamo gives it to a backend: whether more of the captured frame follows it."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


@contextlib.contextmanager
def on_capture(begin: Callable[[], None]) -> Iterator[None]:
    """Inside, ``begin`` is called when Dynamo begins to capture a frame in this thread."""
    here = threading.get_ident()

    def started(_: Any) -> None:
        if threading.get_ident() == here:
            begin()

    callback_handler.register_start_callback(started)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # a reset of Dynamo forgets it
            callback_handler.remove_start_callback(started)


def functional(gm: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """``gm``, a trace of ATen ops under ``mode``, without ops that write in place."""
    if not any(map(is_mutable, gm.graph.nodes)):
        return gm
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    with mode:
        return traced(torch.func.functionalize(fx.Interpreter(gm).run, remove="mutations"), *values)


def traced(fn: Callable[..., Any], *args: Any, written_out: Sequence[str] = ()) -> fx.GraphModule:
    """The ATen graph of ``fn(*args)``; nodes know where they come from, see :func:`origin`.

    ``written_out``: ops that stand in the graph by PyTorch's own decomposition.
    """
    table = get_decompositions([operator_named(name) for name in written_out])
    with fx.traceback.preserve_node_meta(), enable_python_dispatcher(), nothing_saved():
        return make_fx(fn, decomposition_table=table)(*args)


def decompositions(written_out: Sequence[str]) -> Any:
    """What an exported graph is decomposed by: `torch.export`'s table, and ``written_out``."""
    table = torch.export.default_decompositions()
    for op, function in get_decompositions([operator_named(n) for n in written_out]).items():
        table[op] = function
    return table


def operator_named(name: str) -> OpOverload:
    """The operator of a name such as ``aten.mm.default``."""
    namespace, packet, overload = name.split(".")
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found
