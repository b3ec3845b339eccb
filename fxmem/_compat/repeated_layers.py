"""Private names of Dynamo for layers that repeat: one of each kind is traced, and its graph stands
for the others by way of ``invoke_subgraph`` and its reuse of subgraphs (PyTorch 2.13).

Dynamo proves that a layer may take another one's graph by evaluating the guards of the trace on it.
It installs none of them, though, so that a layer that changes later would go unseen: here one guard
compares all layers at every call.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from traceback import StackSummary
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._dynamo import guards as _guards
from torch._dynamo.source import GlobalStateSource, LocalSource, is_from_source
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
    and hasattr(vars(_guards).get("RootGuardManager"), "add_epilogue_lambda_guard")
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
_CONSTANT = ("CONSTANT_MATCH", "EQUALS_MATCH")
_NOWHERE = GlobalStateSource()
"""What a guard of many places belongs to: a layer that reads its place could not be shared."""
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
        self._checks: dict[Any, tuple[Any, _Checks]] = {}
        self._output: Any = None
        self._held: dict[tuple[Any, tuple[str, ...]], _Checks] = {}

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
    back = _Moved({new: old for old, new in roots.items()})
    found = (
        _PLAIN_REUSABLE(tx, inputs, fingerprint, entry)
        and not any(
            back[s] in condition.traced_sources for s in tx.output.side_effects.mutated_sources
        )
        and _guarded(tx, layers, condition, roots)
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


def _guarded(tx: Any, layers: Sharing, condition: Any, roots: Any) -> bool:
    """Install for a layer what guards the one that was traced; False where it does not hold."""
    if not roots:  # the traced layer again, at the same places
        return True
    # what moved may be the layer, its arguments, or both: other places are read, others compared
    key = id(condition), tuple(roots)
    if key not in layers._checks:
        layers._checks[key] = condition, _Checks(tx.output, list(roots))
    checks = layers._checks[key][1]
    names = tuple(new.name for new in roots.values())
    places = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}
    at = [eval(name, places) for name in names]
    if not (checks.always.holds(places["G"], at) and checks.once.holds(places["G"], at)):
        return False
    moved = _Moved(roots)
    made = [moved[g.originating_source].make_guard(g.create_fn) for g in checks.others]
    if layers._output is not tx.output:
        layers._output, layers._held = tx.output, {}
        made.append(_NOWHERE.make_guard(_held_guard(layers._held)))
    layers._held[key, names] = checks
    for guard in made:
        guard.user_stack = _NO_STACK
    _guards.install_guard(*made)
    return True


def _equal(value: Any, expected: Any) -> bool:
    return type(value) is type(expected) and bool(value == expected)  # 1 is neither 1.0 nor True


class _Comparison:
    """Values at places below some roots, and what each is compared with, and how."""

    def __init__(self, rows: Sequence[tuple[str, Callable[[Any, Any], Any], Any]]) -> None:
        text = f"lambda L, G: [{', '.join(name for name, *_ in rows)}]"
        self._read = eval(compile(text, __file__, "eval"))
        self._tests = [(test, expected) for _, test, expected in rows]

    def holds(self, space: Any, roots: Sequence[Any]) -> bool:
        """``roots``: ``L["0"]``, ``L["1"]``, ... of the places; ``space``: their ``G``."""
        try:
            found = self._read({str(i): root for i, root in enumerate(roots)}, space)
            return all(test(v, e) for v, (test, e) in zip(found, self._tests, strict=True))
        except Exception:
            return False


class _Checks:
    """What guards a layer that was traced, to be compared in others.

    Attributes:
        once: what must hold for a layer that takes its graph.
        always: what must hold at every call, too.
        others: guards that cannot be compared so.
    """

    def __init__(self, output: Any, roots: Sequence[Any]) -> None:
        spaces = {"G": output.root_tx.f_globals, "L": output.root_tx.f_locals}
        values: dict[Any, Any] = {}
        numbered = _Moved({root: LocalSource(str(i)) for i, root in enumerate(roots)})
        once: list[tuple[str, Any, Any]] = []
        always: list[tuple[str, Any, Any]] = []
        self.others: list[Any] = []
        for guard in output.guards:
            source, kind = guard.originating_source, guard.create_fn_name()
            if not any(is_from_source(source, root) for root in roots):
                continue
            spec = _guards.GUARD_VALUE_DISPATCH.get(kind)
            if isinstance(spec, _guards.GuardCheckSpec):
                expected = spec.get_metadata_fn(guard, source.get_value(spaces, {}, values))
                rows = once if kind in _ELSEWHERE else always
                test = _equal if kind in _CONSTANT else spec.eval_fn
                rows.append((numbered[source].name, test, expected))
            elif kind not in _ELSEWHERE:
                self.others.append(guard)
        self.once, self.always = _Comparison(once), _Comparison(always)


def _held_guard(held: dict[tuple[Any, tuple[str, ...]], _Checks]) -> Callable[[Any, Any], None]:
    """Makes one guard for all layers that took a graph: a tenth of the time that Dynamo takes to
    make one for everything that it compares.
    """

    def layers_alike(builder: Any, _: Any) -> None:
        space = builder.scope["G"]
        places = ", ".join(f"({', '.join(names)},)" for _, names in held)
        roots = eval(compile(f"lambda L, G: ({places},)", __file__, "eval"))
        always = [checks.always for checks in held.values()]

        def alike(local: Any) -> bool:
            try:
                found = roots(local, space)
            except Exception:
                return False
            return all(c.holds(space, at) for c, at in zip(always, found, strict=True))

        add = builder.guard_manager.root.add_epilogue_lambda_guard
        add(alike, ["layers that share a trace are as they were"], None)

    return layers_alike


if AVAILABLE:
    UnspecializedNNModuleVariable.call_function = _call_function  # type: ignore[method-assign]
    vars(_reuse)["is_reusable"] = _is_reusable
