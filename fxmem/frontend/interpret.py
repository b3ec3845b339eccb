"""Running the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem._compat.data_sizes import evaluating
from fxmem.axes.size_calls import fold
from fxmem.axes.sizes import size
from fxmem.errors import CaptureError
from fxmem.frontend.capture import Graph, is_size, value_of


def run(
    nodes: Sequence[fx.Node],
    env: dict[fx.Node, Any],
    capture: Graph,
    call: Callable[[fx.Node, Any, Any], Any],
) -> None:
    """Interpret Dynamo nodes into ``env`` under their contexts; ``call`` may replace single ops.

    Sizes are computed from the ints in ``env``, so that a trace knows where each comes from.
    """
    ints: dict[Any, Any] = {
        value_of(n).node.expr: env[n] for n in capture.inputs
        if n in env and isinstance(value_of(n), torch.SymInt)
    }  # fmt: skip
    for n in nodes:
        if n in env:
            continue
        if n.op == "get_attr":
            env[n] = attribute(capture.gm, n.target)
            continue
        if is_size(value_of(n)):
            env[n] = _sizes(value_of(n), ints)
            continue
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: env[a])
        with capture.contexts[n].enter(), _compat.origin(n):
            env[n] = call(n, args, kwargs)


def _sizes(value: Any, ints: dict[Any, Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_sizes(v, ints) for v in value)
    expr = size(value)
    return fold(expr, ints) if all(s in ints for s in expr.free_symbols) else value


def attribute(gm: fx.GraphModule, target: str) -> Any:
    """What a ``get_attr`` node of ``gm`` reads."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def fake_call(node: fx.Node, grad: bool) -> Any:
    """What a node gives on the recorded values of its arguments, all of them fake."""
    mode = next(
        (v.fake_mode for a in node.all_input_nodes
         if isinstance(v := value_of(a), _compat.FakeTensor)), None,
    )  # fmt: skip
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with evaluating(mode), torch.set_grad_enabled(grad):
        return call_node(node, args, kwargs)


def call_node(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    raise CaptureError(f"node {node.op} {node.target} is not understood", op=str(node.target))
