"""Outputs of a program in the precision of their accumulator, for a reader that rounds later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxmem.program.steps import Free, Program, Straight
from fxmem.rewriting.pipeline import Required, copy_graph
from fxmem.rewriting.straight import VIEWS, tensors, without


@dataclass(frozen=True, slots=True)
class KeepSumDtype(Required):
    """Leave ``output`` in the precision of the accumulator that it is, or is a view of."""

    output: str
    name: str = "keep_sum_dtype"

    def run(self, program: Program) -> Program:
        sums = {b.name: b.dtype for loop in program.loops for b in loop.allocate if b.zero}
        kept = sums.get(self.output)
        steps = list(program.steps)
        for i, step in enumerate(steps):
            if isinstance(step, Straight) and self.output in step.results:
                step = replace(step, module=copy_graph(step.module))
                kept = _uncast(step, self.output, sums)
                read = {t for s in program.steps if not isinstance(s, Free) for t in s.tensors}
                read.update(o for o in program.outputs if o is not None)
                steps[i] = without(step, set(step.results) - read)
        if kept is None:
            return program
        shapes = {**program.shapes, self.output: (program.shapes[self.output][0], kept)}
        return replace(program, steps=steps, shapes=shapes)


def _uncast(step: Straight, name: str, sums: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """Make the result from views of a sum without the cast before them; the sum's dtype."""
    graph = step.module.graph
    (output,) = graph.find_nodes(op="output")
    at = step.results.index(name)
    chain, node = [], output.args[0][at]
    while isinstance(node, fx.Node) and str(node.target) in VIEWS:
        chain.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or str(node.target) != "aten._to_copy.default":
        return None
    value = node.args[0]
    named = {n: t for t, n in tensors(graph, step.tensors).items()}
    kept = sums.get(named.get(value, ""))
    if kept is None:
        return None
    with graph.inserting_before(output):
        for view in reversed(chain):
            value = graph.call_function(view.target, (value, *view.args[1:]), dict(view.kwargs))
    output.args = (tuple(value if i == at else a for i, a in enumerate(output.args[0])),)
    return kept
