"""Outputs of a program in the precision of their accumulator, for a reader that rounds later."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxmem.program import Free, Program, Straight

_VIEWS = frozenset({"aten.t.default", "aten.view.default", "aten.reshape.default"})


def keep_sum(program: Program, name: str) -> None:
    """Leave the output ``name`` in the precision of the accumulator that it is, or is a view of."""
    sums = {b.name: b.dtype for loop in program.loops for b in loop.allocate if b.zero}
    kept = sums.get(name)
    for step in program.steps:
        if isinstance(step, Straight) and name in step.results:
            kept = _uncast(step, name, sums)
            read = {t for s in program.steps if not isinstance(s, Free) for t in s.tensors}
            _drop_results(step, read | {o for o in program.outputs if o is not None})
    if kept is not None:
        program.shapes[name] = (program.shapes[name][0], kept)


def _uncast(step: Straight, name: str, sums: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """Make the result from views of a sum without the cast before them; the sum's dtype."""
    graph = step.module.graph
    (output,) = graph.find_nodes(op="output")
    at = step.results.index(name)
    chain, node = [], output.args[0][at]
    while isinstance(node, fx.Node) and str(node.target) in _VIEWS:
        chain.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or str(node.target) != "aten._to_copy.default":
        return None
    given = list(graph.find_nodes(op="placeholder"))
    named = dict(zip(given[len(given) - len(step.tensors) :], step.tensors, strict=True))
    value = node.args[0]
    kept = sums.get(named.get(value, ""))
    if kept is None:
        return None
    with graph.inserting_before(output):
        for view in reversed(chain):
            value = graph.call_function(view.target, (value, *view.args[1:]), dict(view.kwargs))
    output.args = (tuple(value if i == at else a for i, a in enumerate(output.args[0])),)
    return kept


def _drop_results(step: Straight, read: set[str]) -> None:
    """Results that nobody reads."""
    graph = step.module.graph
    (output,) = graph.find_nodes(op="output")
    keep = [i for i, r in enumerate(step.results) if r in read]
    output.args = (tuple(output.args[0][i] for i in keep),)
    step.results = [step.results[i] for i in keep]
    graph.eliminate_dead_code()
    step.module.recompile()
