"""Private names of Dynamo for layers that repeat: one of each kind is traced, and its graph stands
for the others by way of ``invoke_subgraph`` and its reuse of subgraphs (PyTorch 2.13).

Dynamo proves that a layer may take another one's graph by evaluating the guards of the trace on it.
It installs none of them, though, so that a layer that changes later would go unseen: here they are
installed for every layer.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import fields, replace
from traceback import StackSummary
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._dynamo import guards as _guards
from torch._dynamo.source import is_from_source
from torch._dynamo.variables import (
    ConstantVariable,
    TensorVariable,
    TupleVariable,
    UnspecializedNNModuleVariable,
    UserFunctionVariable,
)
from torch._guards import Source

from fxmem._compat.errors import while_capturing

try:
    from torch._dynamo.variables import invoke_subgraph as _reuse
except ImportError:  # before PyTorch 2.13
    _reuse = None  # type: ignore[assignment]

__all__ = ["AVAILABLE", "Sharing", "is_shared_call", "layer_of", "sharing"]

_PLAIN_CALL: Any = getattr(UnspecializedNNModuleVariable, "call_function", None)
_PLAIN_REUSABLE: Any = getattr(_reuse, "is_reusable", None)
AVAILABLE = (
    None not in (_PLAIN_CALL, _PLAIN_REUSABLE) and hasattr(_guards, "GUARD_VALUE_DISPATCH")
)  # fmt: skip
"""Whether this PyTorch can stamp out a traced layer again."""
_TRACES = 3
"""Layers of one kind, more than took another's graph, before the kind is traced as it stands."""
_LAYER = "fxmem_layer"
_LOCAL = threading.local()
_ELSEWHERE = ("TENSOR_MATCH", "DUPLICATE_INPUT", "EMPTY_NN_MODULE_HOOKS_DICT")
"""Guards that need not be installed again. Those that hold the tensor itself Dynamo makes where it
makes the input; whether a module of the model has hooks is compared before every call, by
`fxmem._compat.hooks.unguarded`.
"""
_NO_STACK = StackSummary()
"""Of a guard: else Dynamo writes the line of the user's code into each, which takes most of the
time of making it.
"""


class Sharing:
    """Layers of one model that may share a trace. ``kinds``: equal for such layers, by ``id``.

    Attributes:
        traced: layers that were traced to be shared.
        stamped: layers that took the graph of one of these.
        refused: they are traced one by one.
    """

    def __init__(self, kinds: Callable[[], Mapping[int, Hashable]]) -> None:
        self._read = kinds
        self.traced = self.stamped = 0
        self.refused = not AVAILABLE
        self.begin()

    def begin(self) -> None:
        """Another capture, of a model that may have changed."""
        self._kinds: Mapping[int, Hashable] | None = None
        self._functions: dict[Hashable, FunctionType] = {}
        self._alone: set[Hashable] = set()
        self._excess: Counter[Hashable] = Counter()
        self._guards: dict[int, tuple[Any, list[Any]]] = {}

    def kind(self, module: torch.nn.Module) -> Hashable | None:
        if self._kinds is None:
            self._kinds = self._read()
        found = self._kinds.get(id(module))
        return None if found is None or found in self._alone else (found, *_ambient())

    def noted(self, kind: Any, stamped: bool, *, eligible: bool) -> None:
        """A layer has taken a graph or made one; not ``eligible``: with effects, of use to none."""
        self._excess[kind] += -1 if stamped else 1
        if not eligible or self._excess[kind] > _TRACES:
            self._alone.add(kind[0])

    def function(self, kind: Hashable, form: str, count: int) -> FunctionType:
        """``fn(module, *leaves)`` calls the module; its code is another for each kind and form."""
        if (kind, form) not in self._functions:
            names = ", ".join(f"x{i}" for i in range(count))
            text = f"def layer_{len(self._functions)}(module, {names}):\n    return module({form})"
            space: dict[str, Any] = {}
            exec(compile(text, __file__, "exec"), space)
            fn = next(v for v in space.values() if isinstance(v, FunctionType))
            # Dynamo's own limit ends the capture with an error
            vars(fn)["__marked_compile_region_max_reuse_entries__"] = 1 << 30
            self._functions[kind, form] = fn
        return self._functions[kind, form]


@contextlib.contextmanager
def sharing(layers: Sharing) -> Iterator[Callable[[Exception], bool]]:
    """Captures of this thread let these layers share traces. The function that is given says
    whether a capture that failed may succeed without, which is how all are made from then on.
    """
    before = getattr(_LOCAL, "sharing", None)
    _LOCAL.sharing = None if layers.refused else layers
    traced = layers.traced

    def try_without(error: Exception) -> bool:
        layers.refused |= (used := layers.traced > traced and while_capturing(error))
        return used

    try:
        yield try_without
    finally:
        _LOCAL.sharing = before
        layers.begin()  # nothing of this capture stays


def is_shared_call(node: fx.Node) -> bool:
    """The node stands for a layer whose graph others may share."""
    return _LAYER in node.meta


def layer_of(node: fx.Node) -> str:
    """Dynamo's name of the layer that such a node stands for."""
    return str(node.meta[_LAYER])


def _ambient() -> tuple[Any, ...]:
    """What a trace depends on beside the layer and its arguments."""
    devices = ("cpu", torch._C._get_accelerator().type)
    casts = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *casts,
            torch.get_default_dtype())  # fmt: skip


def _form(variable: Any, leaves: list[Any]) -> str | None:
    """An expression over ``x0, x1, ...`` that rebuilds an argument; None where it holds more than
    tensors and constants.
    """
    variable = variable.realize()
    if type(variable) is TupleVariable:
        parts = [_form(v, leaves) for v in variable.items]
        return None if None in parts else f"({', '.join(map(str, parts))},)" if parts else "()"
    if not isinstance(variable, (TensorVariable, ConstantVariable)):
        return None
    leaves.append(variable)
    return f"x{len(leaves) - 1}"


def _call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    layers: Sharing | None = getattr(_LOCAL, "sharing", None)
    outermost = tx.output.current_tracer.parent is None and not tx.output.export
    kind = None
    if layers is not None and outermost and self.source is not None:
        kind = layers.kind(self.value)
    if layers is None or kind is None or torch._C._functorch.maybe_current_level() is not None:
        return _PLAIN_CALL(self, tx, args, kwargs)
    leaves: list[Any] = []
    forms = [_form(a, leaves) for a in args]
    named = {name: _form(a, leaves) for name, a in kwargs.items()}
    if None in forms or None in named.values():
        return _PLAIN_CALL(self, tx, args, kwargs)
    form = ", ".join([*map(str, forms), *(f"{k}={v}" for k, v in named.items())])
    function = layers.function(kind, form, len(leaves))
    call = UserFunctionVariable(function)
    region = _reuse.InvokeSubgraphHigherOrderVariable(torch._higher_order_ops.invoke_subgraph)
    before = layers.stamped
    layers.traced += 1
    result = region.call_function(tx, [call, self, *leaves], {})
    stamped = layers.stamped > before
    layers.traced -= stamped
    layers.noted(kind, stamped, eligible=_reuse.has_reuse_entries(tx, call))
    nodes = tx.output.current_tracer.graph.find_nodes(
        op="call_function", target=torch._higher_order_ops.invoke_subgraph, sort=True
    )
    nodes[-1].meta[_LAYER] = _name(self.get_nn_module_stack_source())
    return result


def _name(source: Any) -> str:
    """A module's name as in ``nn_module_stack``."""
    return re.sub(r"\._(?:modules|parameters|buffers)\[(['\"])([^'\"\]]+)\1\]", r".\2", source.name)


def _is_reusable(tx: Any, condition: Any, fingerprint: Any, entry: Any) -> bool:
    layers: Sharing | None = getattr(_LOCAL, "sharing", None)
    if layers is None:
        return bool(_PLAIN_REUSABLE(tx, condition, fingerprint, entry))
    sources = type(condition.traced_sources)
    inputs = replace(condition, guards=[], traced_sources=sources())
    roots = _reuse.build_source_replacement(entry.arg_sources, fingerprint.arg_sources)
    moved = _Moved(roots)
    found = (
        _PLAIN_REUSABLE(tx, inputs, fingerprint, entry)
        and not _reuse.has_mutated_vars(tx, sources([moved[s] for s in condition.traced_sources]))
        and _guarded(tx, layers, condition, roots, moved)
    )
    layers.stamped += bool(found)
    return bool(found)


class _Moved(dict[Any, Any]):
    """Where another layer has what the one that was traced has at a source."""

    def __missing__(self, source: Any) -> Any:
        parts = {f.name: getattr(source, f.name) for f in fields(source) if f.init}
        new = {name: self[v] for name, v in parts.items() if isinstance(v, Source)}
        changed = any(v is not parts[name] for name, v in new.items())
        self[source] = replace(source, **new) if changed else source
        return self[source]


def _guarded(tx: Any, layers: Sharing, condition: Any, roots: Any, moved: _Moved) -> bool:
    """Install for a layer what guards the one that was traced; False where it does not hold."""
    spaces = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}
    values: dict[Any, Any] = {}
    if id(condition) not in layers._guards:
        layers._guards[id(condition)] = condition, list(_checks(tx, spaces, roots))
    made = []
    for guard, check, expected in layers._guards[id(condition)][1]:
        source = moved[guard.originating_source]
        try:
            holds = check is None or check.eval_fn(source.get_value(spaces, {}, values), expected)
        except Exception:
            holds = False
        if not holds:
            return False
        if guard.create_fn_name() not in _ELSEWHERE:
            made.append(source.make_guard(guard.create_fn))
            made[-1].user_stack = _NO_STACK
    _guards.install_guard(*made)
    return True


def _checks(tx: Any, spaces: Any, roots: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Every guard on what lies below ``roots``: how it is checked and what it expects."""
    values: dict[Any, Any] = {}
    for guard in tx.output.guards:
        source = guard.originating_source
        if not any(is_from_source(source, root) for root in roots):
            continue
        check = _guards.GUARD_VALUE_DISPATCH.get(guard.create_fn_name())
        if isinstance(check, _guards.GuardCheckSpec):
            value = source.get_value(spaces, {}, values)
            yield guard, check, check.get_metadata_fn(guard, value)
        else:
            yield guard, None, None


if AVAILABLE:
    UnspecializedNNModuleVariable.call_function = _call_function  # type: ignore[method-assign]
    vars(_reuse)["is_reusable"] = _is_reusable
