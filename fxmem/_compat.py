"""Every private name of torch that fxmem uses, in one place.

Each name is used by one function below and probed by ``tests/test_compat.py``; a torch release that
moves one fails there with the name, not somewhere in a user's training run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
import torch._dynamo
import torch._guards
from torch import fx
from torch._dynamo.exc import (
    BackendCompilerFailed,
    TensorifyScalarRestartAnalysis,
    TorchDynamoException,
)
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

__all__ = [
    "BackendCompilerFailed", "FakeTensor", "FakeTensorMode", "HigherOrderOperator", "OpOverload",
    "TorchDynamoException", "ambient_autocast", "backward_id", "call_impl", "compile_times",
    "dynamic_inputs", "fake_mode_of", "fixed_sizes", "functional", "input_name", "inside_ddp",
    "is_checkpoint", "is_control_node", "make_fx", "mark_axis_dynamic", "mark_dynamic",
    "may_alias", "origin", "restart_capture", "set_compiled_call", "storage_key", "traced",
    "tree_leaves", "unset_compiled_call", "wrapper_tensor",
]  # fmt: skip


def restart_capture(reason: str) -> None:
    """Ask Dynamo to trace the frame again, with what has been marked dynamic since."""
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def mark_dynamic(tensor: torch.Tensor) -> bool:
    """Mark every dimension of size > 1 as symbolic (a wish, not a demand); True if that is new."""
    fresh = [
        d for d in range(tensor.dim())
        if tensor.shape[d] > 1 and d not in getattr(tensor, "_dynamo_weak_dynamic_indices", ())
    ]  # fmt: skip
    for d in fresh:
        torch._dynamo.maybe_mark_dynamic(tensor, d)
    return bool(fresh)


def mark_axis_dynamic(tensor: torch.Tensor, axis: int) -> None:
    """Demand that one axis is a symbolic size; a graph that fixes it is an error."""
    torch._dynamo.mark_dynamic(tensor, axis)


def dynamic_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors that vary from call to call: neither parameters nor attributes of a module."""
    out = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        source = getattr(node.meta.get("grapharg"), "source", None)
        module_attribute = source is not None and "_modules" in source.name
        if not module_attribute and not (source is not None and "_buffers" in source.name):
            out.append(value)
    return out


def unify_sizes(gm: fx.GraphModule) -> None:
    """Guard that inputs agree in symbolic sizes that have agreed in this call, dimension by
    dimension.

    Dynamo gives every marked dimension a symbol of its own; the guard makes them one.
    """
    seen: dict[tuple[int, int], torch.SymInt] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        for i, s in enumerate(value.shape):
            if isinstance(s, torch.SymInt):
                first = seen.setdefault((i, int(s.node.hint)), s)
                if first is not s:
                    bool(first == s)


def functional(gm: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """``gm``, a trace of ATen ops under ``mode``, without ops that write in place."""
    mutable = [
        n for n in gm.graph.nodes
        if isinstance(n.target, OpOverload) and n.target._schema.is_mutable
    ]  # fmt: skip
    if not mutable:
        return gm
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    with mode:
        return traced(torch.func.functionalize(fx.Interpreter(gm).run, remove="mutations"), *values)


def origin(node: fx.Node) -> contextlib.AbstractContextManager[Any]:
    """What :func:`traced` records meanwhile gets module path and source line of ``node``."""
    return fx.traceback.set_current_meta(node)


def traced(fn: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The ATen graph of ``fn(*args)``; nodes know where they come from, see :func:`origin`."""
    with fx.traceback.preserve_node_meta():
        return make_fx(fn)(*args)


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The fake mode that Dynamo captured ``gm`` under."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def capture_config() -> contextlib.AbstractContextManager[Any]:
    """How Dynamo captures a model: logger calls are skipped, Python floats stay constants, a model
    inside DistributedDataParallel is not split at its buckets, and captures of other models of the
    process, which run the same code, do not count.
    """
    levels = ("debug", "info", "warning", "warning_once", "info_once", "warning_advice", "error")
    methods = {getattr(logging.Logger, n) for n in levels if hasattr(logging.Logger, n)}
    known = torch._dynamo.config.ignore_logging_functions
    return torch._dynamo.config.patch(
        ignore_logging_functions={*known, *methods}, specialize_float=True, optimize_ddp=False,
        accumulated_recompile_limit=1 << 30,
    )  # fmt: skip


def is_control_node(node: fx.Node) -> str | None:
    """``"grad"``, ``"enter"`` or ``"exit"`` for nodes that only switch grad mode or autocast."""
    if node.op != "call_function":
        return None
    if node.target in (torch._C._set_grad_enabled, torch.set_grad_enabled):
        return "grad"
    if node.target is torch.amp.autocast_mode._enter_autocast:
        return "enter"
    if node.target is torch.amp.autocast_mode._exit_autocast:
        return "exit"
    if node.target is torch._C._log_api_usage_once:
        return "log"
    return None


def may_alias(node: fx.Node) -> bool:
    """The result may be a view of an operand; functions without a schema are taken to make one."""
    if isinstance(node.target, OpOverload):
        return any(r.alias_info is not None for r in node.target._schema.returns)
    return True


def is_checkpoint(node: fx.Node) -> bool:
    """The node calls a body under activation checkpointing: ``(body, *operands)``."""
    return (
        isinstance(node.target, HigherOrderOperator)
        and node.target.name() == "tag_activation_checkpoint"
    )


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share a storage, fake ones too, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def fixed_sizes() -> list[str]:
    """Source lines at which the capture under way gave up a symbolic size for a number."""
    context = torch._guards.TracingContext.try_get()
    env = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    places = [
        str(guard.sloc.maybe_user_loc)
        for guard in ([] if env is None else env.guards)
        if isinstance(guard.expr, sympy.Eq) and guard.expr.rhs.is_Integer
        and guard.sloc.maybe_user_loc is not None
    ]  # fmt: skip
    return list(dict.fromkeys(place.strip() for place in places))


def input_name(node: fx.Node) -> str:
    """What the user calls an input of the capture, such as ``model.norm.weight``."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = str(node.target) if source is None else str(source.name)
    for part in ("_modules['", "_parameters['", "_buffers['", "L['self'].", "L['"):
        name = name.replace(part, "")
    return name.replace("']", "")


def call_impl(module: torch.nn.Module) -> Callable[..., Any]:
    """The module's ``__call__`` without compiled forms: hooks and forward."""
    return module._call_impl


def set_compiled_call(module: torch.nn.Module, call: Callable[..., Any]) -> None:
    """Make ``module(...)`` run ``call``; class, forward and state_dict stay, copies and pickles
    forget it.
    """
    module._compiled_call_impl = call


def unset_compiled_call(module: torch.nn.Module) -> None:
    module._compiled_call_impl = None


@contextlib.contextmanager
def ambient_autocast(state: Sequence[tuple[str, torch.dtype, bool]]) -> Iterator[None]:
    """Re-enter the given autocast states without a weight cache, and none else."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled in state:
            stack.enter_context(
                torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
            )
        yield


def compile_times() -> float:
    """Seconds that Dynamo has spent in this process on whole frames, backends included."""
    times = torch._dynamo.utils.compilation_time_metrics
    return float(
        sum(times.get("_compile.compile_inner", []) or times.get("entire_frame_compile", []))
    )


def wrapper_tensor(
    cls: type, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Any:
    """An instance of a tensor subclass that has metadata and no storage."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def backward_id() -> int:
    """Number of the autograd pass that runs now, different for each ``backward()``; -1 outside."""
    return torch._C._current_graph_task_id()


def inside_ddp() -> bool:
    """Whether a DistributedDataParallel module is running its forward."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None
