"""Every private name of torch that fxmem uses, in one place.

Each name is used by one function below and probed by ``tests/_compat/test_compat.py``; a torch
release that moves one fails there with the name, not somewhere in a user's training run.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
import torch._dynamo
import torch._guards
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "FakeTensor", "FakeTensorMode", "HigherOrderOperator", "OpOverload", "TorchDispatchMode",
    "after_backward", "ambient_autocast", "assume", "backward_id", "call_impl", "compile_times",
    "compiled_call",
    "enable_python_dispatcher", "fake_mode_of", "fixed_sizes", "hint_bytes", "is_fixed",
    "inlined_operands", "input_name", "is_control_node", "is_custom_function",
    "is_forward_mode", "is_mutable", "is_random", "is_transformed", "is_view",
    "may_alias", "named_arguments",
    "no_autocast", "origin", "runs_in_this_pass",
    "schema_names", "set_compiled_call", "size_guards", "storage_key", "transform_step",
    "tree_leaves", "tree_map_only", "unary_functions", "unset_compiled_call", "wrapper_tensor",
]  # fmt: skip


BY_INDEX = {"gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce"}
"""Functions whose operands may have other sizes."""


def unify_sizes(gm: fx.GraphModule) -> None:
    """Guard that inputs agree in symbolic sizes that have agreed in this call, dimension by
    dimension.

    Dynamo gives every marked dimension a symbol of its own; the guard makes them one. It also
    passes a number for each; of equal ones the first is used. Source and index of a gather need
    not agree, but rows can be told apart only where they do.
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
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", node.target) in BY_INDEX:
            values = [a.meta.get("example_value") for a in node.all_input_nodes]
            shapes = [v.shape for v in values if isinstance(v, torch.Tensor) and v.dim()]
            for sizes in zip(*shapes, strict=False):
                symbolic = [s for s in sizes if isinstance(s, torch.SymInt)]
                for size in symbolic[1:]:
                    if size.node.hint == symbolic[0].node.hint:
                        bool(size == symbolic[0])
    numbers: dict[sympy.Expr, fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            same = numbers.setdefault(value.node.expr, node)
            if same is not node:
                node.replace_all_uses_with(same)


def is_mutable(node: fx.Node) -> bool:
    """The node calls an operator that writes to an operand."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def origin(node: fx.Node) -> contextlib.AbstractContextManager[Any]:
    """What :func:`traced` records meanwhile gets module path and source line of ``node``."""
    return fx.traceback.set_current_meta(node)


def unary_functions() -> dict[str, Callable[[Any], Any]]:
    """Functions of real numbers that a size may be computed with, by name.

    PyTorch's own take symbolic numbers too; those of ``math`` would fix them.
    """
    symbolic = ["sqrt", "cos", "cosh", "sin", "sinh", "tan", "tanh", "asin", "acos", "atan", "log2"]
    own = {n: getattr(torch, f"_sym_{n}") for n in symbolic}
    return own | {n: getattr(math, n) for n in ("asinh", "exp", "log")}


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The fake mode that Dynamo captured ``gm`` under."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def capture_config() -> contextlib.AbstractContextManager[Any]:
    """How Dynamo captures a model: logger calls are skipped, Python floats stay constants, a model
    inside DistributedDataParallel is not split at its buckets, captures of other models of the
    process, which run the same code, do not count, errors keep the frames they came through, and
    garbage is left to the collector.
    What Dynamo takes for unchanged by default is compared at every call: hooks, ties of parameters,
    parameters of unchanged modules, code of functions.
    """
    levels = ("debug", "info", "warning", "warning_once", "info_once", "warning_advice", "error")
    methods = {getattr(logging.Logger, n) for n in levels if hasattr(logging.Logger, n)}
    known = torch._dynamo.config.ignore_logging_functions
    return torch._dynamo.config.patch(
        ignore_logging_functions={*known, *methods}, specialize_float=True, optimize_ddp=False,
        accumulated_recompile_limit=1 << 30, verbose=True, skip_nnmodule_hook_guards=False,
        run_gc_after_compile=False,
        skip_no_tensor_aliasing_guards_on_parameters=False,
        skip_tensor_guards_with_matching_dict_tags=False,
        assume_dunder_attributes_remain_unchanged=False,
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
    autograd = torch._C._autograd
    if node.target in (
        torch._C._log_api_usage_once, torch._functorch.predispatch.lazy_load_decompositions,
        autograd._saved_tensors_hooks_disable, autograd._saved_tensors_hooks_enable,
    ):  # fmt: skip
        return "log"
    return None


def schema_names(op: OpOverload) -> dict[str, bool]:
    """Names of an operator's parameters, and whether each may stand by position."""
    return {a.name: not a.kwarg_only for a in op._schema.arguments}


def is_random(target: Any) -> bool:
    """The op draws from a generator. Not every such op of ATen has the tag."""
    if not isinstance(target, OpOverload):
        return False
    if not any("Tensor" in str(r.type) for r in target._schema.returns):
        return False
    drawn = any(a.name == "generator" for a in target._schema.arguments)
    return drawn or torch.Tag.nondeterministic_seeded in target.tags


def named_arguments(op: OpOverload, args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
    """Arguments of a call by their names in the schema, defaults filled in."""
    schema = op._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found.update(zip((a.name for a in schema), args, strict=False))
    return found | dict(kwargs)


def may_alias(node: fx.Node) -> bool:
    """The result may be a view of an operand; functions without a schema are taken to make one."""
    if isinstance(node.target, OpOverload) and str(node.target) != "aten._unsafe_view.default":
        return any(r.alias_info is not None for r in node.target._schema.returns)
    return True  # one schema does not say what it does


def inlined_operands(node: fx.Node) -> tuple[Any, ...] | None:
    """Operands of a call whose body may stand in its place: an activation checkpoint ``(body,
    *operands)`` or a nested compile region ``(body, name, *operands)``; None for other nodes.
    """
    name = node.target.name() if isinstance(node.target, HigherOrderOperator) else ""
    skip = {"tag_activation_checkpoint": 1, "invoke_subgraph": 2}.get(name)
    return None if skip is None else tuple(node.args[skip:])


def is_custom_function(node: fx.Node) -> bool:
    """The node calls a ``torch.autograd.Function``: ``(forward, backward, *operands)``."""
    return node.target is torch.ops.higher_order.autograd_function_apply


def transform_step(node: fx.Node) -> int:
    """1 where a function transform (vmap, grad, jvp) begins, -1 where it ends, else 0."""
    functorch, wrappers = torch._C._functorch, torch._functorch.predispatch
    if node.target in (
        wrappers._vmap_increment_nesting, functorch._grad_increment_nesting,
        wrappers._jvp_increment_nesting,
    ):  # fmt: skip
        return 1
    return -(
        node.target in (
            wrappers._vmap_decrement_nesting, functorch._grad_decrement_nesting,
            wrappers._jvp_decrement_nesting,
        )
    )  # fmt: skip


def is_forward_mode(node: fx.Node) -> bool:
    """Forward-mode derivatives begin here (``torch.func.jvp``)."""
    return node.target is torch._functorch.predispatch._jvp_increment_nesting


def is_transformed(value: Any) -> bool:
    """A tensor that only the function transform it was made under can read."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return isinstance(value, torch.Tensor) and bool(wrapped(value))


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Without autocast on any device."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", torch._C._get_accelerator().type):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def is_view(tensor: torch.Tensor) -> bool:
    """The tensor is a view of another one."""
    return bool(tensor._is_view())


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share a storage, fake ones too, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def hint_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a fake tensor at the sizes it was captured with; a size unknown until then is 1."""
    count: int = tensor.dtype.itemsize
    for s in tensor.shape:
        count *= (s.node.hint or 1) if isinstance(s, torch.SymInt) else s
    return count


def size_guards(mode: FakeTensorMode | None) -> list[sympy.Basic]:
    """Every comparison of sizes that was decided under ``mode`` by their present values, in the
    symbols that are left since others were found equal to them, and these findings themselves (a
    size is a number for good, two sizes are one).
    """
    env = None if mode is None else mode.shape_env
    if env is None:
        return []
    decided = [guard.expr for guard in env.guards]
    return [e if (left := env.replace(e)) == sympy.true else left for e in decided]


def is_fixed(mode: FakeTensorMode | None, symbol: sympy.Symbol) -> bool:
    """A size was given up for a number under ``mode``."""
    env = None if mode is None else mode.shape_env
    return env is not None and bool(env.replace(symbol).is_number)


def assume(mode: FakeTensorMode | None, guards: Sequence[sympy.Basic]) -> bool:
    """Whether the present sizes fulfil ``guards``; if all do, further calls are guarded by them."""
    env = None if mode is None else mode.shape_env
    if not guards or env is None:
        return not guards
    known = set(env.var_to_range)
    if not all(g.free_symbols <= known for g in guards):
        return False
    wanted = [env.create_symboolnode(g) for g in guards]
    return all(w.node.hint for w in wanted) and all(map(bool, wanted))


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
    """Make ``module(...)`` run ``call``; class, forward and state_dict stay; copies and pickles
    forget it, see ``carry.py``.
    """
    module._compiled_call_impl = call


def compiled_call(module: torch.nn.Module) -> Callable[..., Any] | None:
    """What ``module(...)`` runs in place of its forward."""
    return module._compiled_call_impl


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


def after_backward(call: Callable[[], None]) -> None:
    """Inside a backward: call once when the whole ``backward()`` has run."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def runs_in_this_pass(node: Any) -> bool:
    """Whether the autograd pass that runs now has run a node's backward or will do so."""
    return torch._C._will_engine_execute_node(node)
