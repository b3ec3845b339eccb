"""Inline activation checkpoints and nested compile regions: the body takes the place of the call.

A streamed region keeps its inputs and recomputes the rest, chunk by chunk, so a checkpoint inside
it has nothing left to save; as one opaque call it could be neither cut nor cut up into regions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem._compat.hooks import is_hook
from fxmem._compat.repeated_layers import is_shared_call, layer_of
from fxmem.frontend.capture import contexts_of
from fxmem.frontend.interpret import fake_call
from fxmem.passes.functionalize import writes
from fxmem.rewriting.pipeline import Pass, Required, copy_graph, run_passes


@dataclass(frozen=True, slots=True)
class InlineBodies(Required):
    """Replace every checkpoint and nested compile region, those inside others too, by the nodes of
    its body.
    """

    name: str = "inline_bodies"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if not _calls(gm):
            return gm
        gm = copy_graph(gm)
        while calls := _calls(gm):
            for node in calls:
                _inline(gm, node)
        return copy_graph(gm)  # without the bodies that nothing calls now


def inline_layers(
    gm: fx.GraphModule, passes: Sequence[Pass[fx.GraphModule]] = ()
) -> fx.GraphModule:
    """``gm`` with the graph of every layer that shares a trace in place of its call.

    Where nothing writes in place, ``passes`` rewrite such a graph first, once for all its layers,
    and what is around them.
    """
    calls = list(filter(is_shared_call, gm.graph.nodes))
    if not calls:
        return gm
    gm = copy_graph(gm)
    bodies = {name: getattr(gm, name) for name in (str(_body_of(n).target) for n in calls)}
    around = (gm, *bodies.values())
    views: dict[Any, fx.Node] | None = None
    if not any(writes(n) or is_hook(n) for part in around for n in part.graph.nodes):
        views = {}
        for name, body in bodies.items():
            setattr(gm, name, run_passes(passes, body))
        gm = run_passes(passes, gm)
    first: dict[str, str] = {}
    again: set[fx.Node] = set()
    for node in filter(is_shared_call, list(gm.graph.nodes)):
        layer = layer_of(node)
        traced = first.setdefault(str(node.args[1]), layer)
        made = _inline(gm, node, views)
        for inner in made if traced != layer else ():
            _rename(inner, traced, layer)
        again.update(made if traced != layer else ())
    if views is None:
        _values_of_their_own(gm, again)
    return gm


def _rename(node: fx.Node, old: str, new: str) -> None:
    """The node stands for ``new`` where the trace has ``old``."""
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {
        key: (new + path[len(old) :] if f"{path}.".startswith(f"{old}.") else path, cls)
        for key, (path, cls) in stack.items()
    }


def _values_of_their_own(gm: fx.GraphModule, nodes: set[fx.Node]) -> None:
    """Values that were recorded once for several layers, anew for each node: where ops write in
    place, what shares memory is told by them.
    """
    contexts = contexts_of(gm)[0]
    for node in gm.graph.nodes:
        if node in nodes and node in contexts and node.op != "get_attr":
            with contexts[node].enter():
                node.meta["example_value"] = fake_call(node, contexts[node].grad)


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if _compat.inlined_operands(n) is not None]


def _body_of(node: fx.Node) -> fx.Node:
    """The attribute that a call of a body reads."""
    body = node.args[0]
    assert isinstance(body, fx.Node)
    return body


def _inline(
    gm: fx.GraphModule, node: fx.Node, views: dict[Any, fx.Node] | None = None
) -> list[fx.Node]:
    """Put the body in place of its call; the nodes that are new.

    ``views``: of values without a gradient, such as positions, by what makes them. One is enough
    for all bodies where nothing writes in place.
    """
    function, operands = _body_of(node), _compat.inlined_operands(node) or ()
    body = getattr(gm, str(function.target))
    placeholders = body.graph.find_nodes(op="placeholder")
    env: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda a: env[a])
            elif inner.op != "placeholder":
                key = None if views is None or not _is_view(inner) else _call(inner, env)
                if views is not None and key in views:
                    env[inner] = views[key]
                    continue
                env[inner] = gm.graph.node_copy(inner, lambda a: env[a])
                if views is not None and key is not None:
                    views[key] = env[inner]
                if inner.op == "get_attr":
                    env[inner].target = _adopt(gm, body, str(inner.target))
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(results, (tuple, list)):
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            gm.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results)
    gm.graph.erase_node(node)
    if not function.users:
        gm.graph.erase_node(function)
    known = {*operands, *(views or {}).values()}
    return [n for n in env.values() if n not in known]


def _is_view(node: fx.Node) -> bool:
    """A view, without a gradient, of its first operand."""
    source = node.args[0] if node.args else None
    made, of = (
        n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in (node, source)
    )
    return (
        isinstance(made, torch.Tensor) and isinstance(of, torch.Tensor)
        and not made.requires_grad and not of.requires_grad
        and made._base is not None and made._base is (of if of._base is None else of._base)
    )  # fmt: skip


def _call(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """What is called on what."""
    given = fx.map_arg((node.args, dict(node.kwargs)), lambda a: env[a])
    return node.op, node.target, repr(given)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """A name in ``gm`` for an attribute of ``body``."""
    value: Any = body
    for part in target.split("."):
        value = getattr(value, part)
    name = base = f"{target.replace('.', '_')}_inlined"
    count = 0
    while hasattr(gm, name):
        count += 1
        name = f"{base}_{count}"
    setattr(gm, name, value)
    return name
