"""Gradient hooks inside the model become functions, at which the graph is cut into regions.

A hook on a tensor (``x.register_hook``) or on a module (``register_full_backward_hook``) runs once
in a backward, on the gradient of a whole value. A streamed region has no such gradient inside it,
so the values that hooks watch are passed from region to region, and the hooks run between them,
under plain autograd.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxmem._compat import hooks as _compat_hooks
from fxmem.errors import HookError
from fxmem.frontend.capture import value_of
from fxmem.frontend.origin import module_path, source_line
from fxmem.passes.drop_identities import DropIdentities
from fxmem.passes.functionalize import writes
from fxmem.passes.inline_bodies import InlineBodies
from fxmem.passes.piece_borders import take_apart
from fxmem.rewriting.pipeline import Required, copy_graph


@dataclass(frozen=True, slots=True)
class HookBorders(Required):
    """Let every use of a watched value be a use of what its hook gives."""

    name: str = "hook_borders"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if not _hooks(*_graphs(gm)):
            return gm
        gm = copy_graph(InlineBodies().run(DropIdentities().run(gm)))
        if inner := _hooks(*_graphs(gm)[1:]):
            raise HookError(
                "a hook on a gradient inside a function with a backward of its own",
                module=module_path(inner[0]), source=source_line(inner[0]),
            )  # fmt: skip
        _one_node_each(gm)
        for node in list(gm.graph.nodes):
            if node.op == "call_method" and _compat_hooks.is_hook(node):
                _pass_learned(node)
            elif _registers(node):
                _watched(node)
        for node in list(gm.graph.nodes):
            if isinstance(value_of(node), (tuple, list)):
                take_apart(node)
        gm.graph.lint()
        gm.recompile()
        return gm


def _graphs(gm: fx.GraphModule) -> list[fx.Graph]:
    """The graph and those of its bodies."""
    return [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]


def _hooks(*graphs: fx.Graph) -> list[fx.Node]:
    return [n for graph in graphs for n in graph.nodes if _compat_hooks.is_hook(n)]


def _one_node_each(gm: fx.GraphModule) -> None:
    """Calls that give their argument back (``x.contiguous()``) are that argument to a hook; those
    that write to it first do more.
    """
    first: dict[int, fx.Node] = {}
    for node in list(gm.graph.nodes):
        value = None if writes(node) else value_of(node)
        if isinstance(value, Tensor) and (known := first.setdefault(id(value), node)) is not node:
            node.replace_all_uses_with(known)
            gm.graph.erase_node(node)


def _registers(node: fx.Node) -> bool:
    return _compat_hooks.is_hook(node) and value_of(node) is None


def _watched(node: fx.Node) -> None:
    """``node`` registers a hook on its first argument; uses before it are watched too."""
    value, state = node.args
    assert isinstance(value, fx.Node)
    with node.graph.inserting_after(value if value.op != "placeholder" else state):
        new = node.graph.call_function(_compat_hooks.watched(node.target), (value, state))
    new.meta = dict(value.meta) | {k: node.meta[k] for k in ("stack_trace",) if k in node.meta}
    # A later hook on the value goes before this one, so that a gradient meets them in order.
    value.replace_all_uses_with(
        new, delete_user_cb=lambda user: user is not new and not _registers(user)
    )
    node.graph.erase_node(node)


def _pass_learned(node: fx.Node) -> None:
    """A hook on a module gives its tensors anew; those without a gradient stay as they are."""
    hook, values = node.args
    if not isinstance(values, (tuple, list)):
        return
    learned = [isinstance(v, fx.Node) and isinstance(t := value_of(v), Tensor) and t.requires_grad
               for v in values]  # fmt: skip
    for user in list(node.users):
        if user.target is operator.getitem and not learned[user.args[1]]:
            user.replace_all_uses_with(values[user.args[1]])
            node.graph.erase_node(user)
    node.args = (hook, tuple(v if own else None for v, own in zip(values, learned, strict=True)))
    given: Any = value_of(node)
    node.meta["example_value"] = tuple(
        t if own else None for t, own in zip(given, learned, strict=True)
    )
