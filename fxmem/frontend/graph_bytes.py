"""Traced graphs as bytes, for another process: nodes, targets by name, sizes as expressions.

Of a node's ``meta`` what is read after a trace is kept. Values are not: their shapes are in the
infos beside the graph, and a size is its expression.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxmem._compat.graph import HigherOrderOperator, OpOverload

_KEPT = ("info", "joint", "stack_trace")
_STACKS = ("nn_module_stack", "fwd_nn_module_stack")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_SIZES = (int, float, sympy.Basic, *_SYMBOLIC)
"""Of a graph that was read, a size is its expression already."""
_LARGEST = 1 << 16
"""Elements of a constant that is kept."""


def dumps(value: Any) -> bytes:
    """
    Raises:
        pickle.PicklingError: another process could not make something of it again.
    """
    stream = io.BytesIO()
    try:
        _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:  # of objects that are no data; each library has its own
        raise pickle.PicklingError(repr(error)) from error
    return stream.getvalue()


def loads(data: bytes) -> Any:
    """What :func:`dumps` was given."""
    return _Unpickler(io.BytesIO(data)).load()


class _At(int):
    """The position of a node in its own graph."""


class _Pickler(pickle.Pickler):
    """A node is named by its graph and its position there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._positions: dict[fx.Graph, dict[fx.Node, int]] = {}

    def _at(self, node: fx.Node) -> int:
        graph = node.graph
        if graph not in self._positions:
            self._positions[graph] = {n: i for i, n in enumerate(graph.nodes)}
        return self._positions[graph][node]

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, fx.Node):
            return obj.graph, self._at(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, fx.GraphModule):
            names = [n.target for n in obj.graph.find_nodes(op="get_attr")]
            return _module, (obj.graph, {name: getattr(obj, name) for name in names})
        if isinstance(obj, fx.Graph):
            return fx.Graph, (), [self._record(n) for n in obj.nodes], None, None, _fill
        if isinstance(obj, OpOverload):
            name, overload = obj._schema.name, obj._schema.overload_name or "default"
            return _overload, (*name.split("::"), overload)
        if isinstance(obj, HigherOrderOperator):
            raise pickle.PicklingError(f"{obj} is of this process")
        if isinstance(obj, _SYMBOLIC):
            return _same, (obj.node.expr,)
        if isinstance(obj, Tensor) and (type(obj) is not Tensor or obj.numel() > _LARGEST):
            raise pickle.PicklingError("a tensor of this process")
        return NotImplemented

    def _record(self, node: fx.Node) -> tuple[Any, ...]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _At(self._at(n)))
        meta = {k: node.meta[k] for k in _KEPT if k in node.meta}
        if isinstance(value := node.meta.get("val"), _SIZES):
            meta["val"] = value
        for key in _STACKS:
            if stack := node.meta.get(key):
                path, *_ = list(stack.values())[-1]
                meta[key] = {"": (str(path), None)}
        return node.op, node.name, node.target, args, kwargs, meta


class _Unpickler(pickle.Unpickler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._nodes: dict[fx.Graph, list[fx.Node]] = {}

    def persistent_load(self, pid: tuple[fx.Graph, int]) -> fx.Node:
        graph, at = pid
        if graph not in self._nodes:
            self._nodes[graph] = list(graph.nodes)
        return self._nodes[graph][at]


def _fill(graph: fx.Graph, records: list[tuple[Any, ...]]) -> None:
    nodes: list[fx.Node] = []
    for op, name, target, args, kwargs, meta in records:
        own, named = _placed((args, kwargs), nodes)
        node = graph.create_node(op, target, own, named, name)
        node.meta.update(meta)
        nodes.append(node)


def _placed(value: Any, nodes: list[fx.Node]) -> Any:
    """``value`` with nodes for their positions."""
    if isinstance(value, _At):
        return nodes[value]
    if isinstance(value, (tuple, list)):
        return type(value)(_placed(v, nodes) for v in value)
    if isinstance(value, dict):
        return {k: _placed(v, nodes) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_placed(v, nodes) for v in (value.start, value.stop, value.step)))
    return value


def _module(graph: fx.Graph, attributes: dict[str, Any]) -> fx.GraphModule:
    return fx.GraphModule(attributes, graph)


def _overload(space: str, name: str, overload: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, space), name), overload)
    return found


def _same(value: Any) -> Any:
    return value


__all__ = ["dumps", "loads"]
