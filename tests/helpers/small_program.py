"""A program written by hand: one loop that adds up over chunks, and reads a weight."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from fxmem.axes.signature import TensorInfo
from fxmem.axes.sizes import T
from fxmem.program import body_ops as runtime
from fxmem.program.steps import Buffer, Loop, Program

aten = torch.ops.aten
WIDE = (T, sympy.Integer(3))
SHAPES: dict[str, Any] = {
    "weight": (WIDE[1:], torch.float64), "x": (WIDE, torch.float64), "out": (WIDE, torch.float64),
    "acc": (WIDE[1:], torch.float64),
}  # fmt: skip


def program(add: Any, view: Any) -> Program:
    """``out = 2 view(exp(x w))``, and ``add(acc, its sum over the rows of a chunk)``."""
    graph = fx.Graph()
    names = ("T", "lo", "hi", "weight", "x", "out", "acc")
    _, lo, hi, weight, x, out, acc = (graph.placeholder(n) for n in names)
    info = TensorInfo(WIDE, torch.float64)

    def made(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["info"] = info
        return node

    rows = graph.call_function(operator.sub, (hi, lo))
    chunk = made(runtime.take, x, 0, lo, rows)
    inner = made(aten.exp.default, made(aten.mul.Tensor, chunk, weight))
    doubled = made(aten.mul.Tensor, made(view, inner), 2)
    graph.call_function(runtime.put, (out, doubled, 0, lo))
    total = graph.call_function(aten.sum.dim_IntList, (doubled, [0]))
    graph.call_function(add, (acc, total))
    graph.output(None)
    buffers = [Buffer(n, *SHAPES[n], torch.float64, n == "acc") for n in ("out", "acc")]
    loop = Loop(fx.GraphModule({}, graph), ["T"], list(names[3:]), [], False, buffers, [])
    return Program("p", ["T"], ["weight", "x"], ["acc", "out"], [loop], [], True, [], dict(SHAPES))
