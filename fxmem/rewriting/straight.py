"""Straight code and bodies of a program: their names and nodes, for passes over programs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fxmem.program.steps import Straight
from fxmem.rewriting.patterns import RESHAPES
from fxmem.rewriting.pipeline import copy_graph

VIEWS = frozenset(("aten.t.default", *RESHAPES))
"""Views between a sum and what is returned for it."""


def results(step: Straight) -> list[Any]:
    """The nodes of its results."""
    (output,) = step.module.graph.find_nodes(op="output")
    return list(output.args[0])


def tensors(graph: fx.Graph, names: Sequence[str]) -> dict[str, fx.Node]:
    """The placeholders of the tensor arguments, which come last."""
    given = list(graph.find_nodes(op="placeholder"))
    return dict(zip(names, given[len(given) - len(names) :], strict=True))


def without(step: Straight, names: Collection[str]) -> Straight:
    """The step without results ``names`` and what only they need."""
    module = copy_graph(step.module)
    (output,) = module.graph.find_nodes(op="output")
    keep = [i for i, r in enumerate(step.results) if r not in names]
    output.args = (tuple(output.args[0][i] for i in keep),)
    module.graph.eliminate_dead_code()
    given = tensors(module.graph, step.tensors)
    for node in given.values():
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    left = [t for t in step.tensors if given[t].users]
    return replace(step, module=module, tensors=left, results=[step.results[i] for i in keep])
