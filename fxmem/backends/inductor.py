"""Chunk bodies through Inductor: each is compiled once, for every chunk and every length.

The body's segments (:mod:`fxmem.backends.segments`) are compiled with symbolic sizes; the loop
itself is never given to the compiler, which would fuse its chunks back together. Sizes are found by
running the body on fake tensors whose lengths are symbols: ``rows`` of the chunk, ``lo``, ``T``,
the batch. What Inductor assumed about them is checked at every call, and where it does not hold the
segment runs as it stands.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat.inductor import Symbolic
from fxmem.backends.segment_code import SegmentCall
from fxmem.backends.segment_form import Form
from fxmem.backends.segments import Segment, segments
from fxmem.backends.stats import STATS, progress
from fxmem.backends.symbolic_body import Layout, layout, propagate
from fxmem.program import body_ops as runtime
from fxmem.program.steps import Loop, Program, Step

__all__ = ["STATS", "CompileLoops", "CompiledBody"]


@dataclass(frozen=True, slots=True)
class CompileLoops:
    """Let the loops of a program run compiled; they are compiled at their first call."""

    name: str = "compile_loops"

    def run(self, program: Program) -> Program:
        steps: list[Step] = []
        for i, step in enumerate(program.steps):
            if isinstance(step, Loop):
                body = CompiledBody(f"{program.name} step {i}", step, program)
                step = replace(step, compiled=body)
            steps.append(step)
        return replace(program, steps=steps)


class CompiledBody:
    """A loop's body; :meth:`bind` gives what runs for these tensors."""

    def __init__(self, label: str, loop: Loop, program: Program) -> None:
        self.label, self.loop = label, loop
        self.shapes = [program.shapes[t][0] for t in loop.tensors]
        self.forms: dict[Any, Callable[..., None]] = {}

    def bind(self, tensors: Sequence[Tensor]) -> Callable[..., None]:
        """The compiled body for tensors of these types and layouts, not sizes."""
        layouts = [layout(t) for t in tensors]
        key = tuple((t.dtype, t.device, how) for t, how in zip(tensors, layouts, strict=True))
        if key not in self.forms:
            self.forms[key] = self._compile(tensors, layouts)
        return self.forms[key]

    def _compile(self, tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> Callable[..., None]:
        start = time.perf_counter()
        graph = self.loop.module.graph
        try:
            values, sizes = propagate(self.loop, self.shapes, tensors, layouts)
            parts = segments(graph)
            made = [p for p in parts if isinstance(p, Segment) and p.gains]
            with progress(self.label, len(made)) as advance:
                new = _join(self.loop.module, parts, values, sizes, advance)
        except Exception as error:  # what is not compiled runs as it stands, exact
            STATS.failed[self.label] = f"{type(error).__name__}: {error}".split("\n")[0]
            return self.loop.module
        STATS.bodies += 1
        STATS.seconds += time.perf_counter() - start
        return new


def _join(
    module: fx.GraphModule, parts: Sequence[Segment | fx.Node], values: Mapping[fx.Node, Any],
    sizes: Symbolic, advance: Callable[[], None],
) -> fx.GraphModule:  # fmt: skip
    """The body with its segments compiled."""
    root = torch.nn.Module()
    root.__dict__.update({k: v for k, v in module.__dict__.items() if k in ("_buffers",)})
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    ints: dict[str, fx.Node] = {}
    calls = 0
    for part in parts:
        if isinstance(part, fx.Node):
            env[part] = graph.node_copy(part, env.__getitem__)
            if part.op == "placeholder" or part.target is runtime.clamp:
                ints[part.name if part.op != "placeholder" else str(part.target)] = env[part]
            value = values.get(part)
            if _comes_from_outside(part) and isinstance(value, Tensor):
                env[part] = graph.call_function(runtime.laid_out, (env[part], _order(value)))
            continue
        if not part.gains:
            for node in part.nodes:
                env[node] = graph.node_copy(node, env.__getitem__)
            continue
        if "rows" not in ints:
            ints["rows"] = graph.call_function(operator.sub, (ints["hi"], ints["lo"]))
        run = SegmentCall(Form.of(part, values, sizes))
        root.add_module(f"segment{calls}", run)
        held = graph.call_function(
            runtime.box, (*(ints[n] for n in run.names), *(env[n] for n in run.tensors))
        )
        results = graph.call_module(f"segment{calls}", (held,))
        for i, node in enumerate(part.outputs):
            env[node] = graph.call_function(operator.getitem, (results, i))
        calls += 1
        advance()
    graph.lint()
    return fx.GraphModule(root, graph)


def _comes_from_outside(node: fx.Node) -> bool:
    """The real value may lie in memory otherwise than the fake one."""
    source = node
    while source.target is operator.getitem and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source.op == "call_function" and source.target not in (runtime.take, runtime.clamp)


def _order(value: Tensor) -> tuple[int, ...]:
    """Dimensions by stride, the largest first."""
    if value.is_contiguous():
        return tuple(range(value.dim()))
    return (0, 2, 1, 3)
