"""Buffers that may take the place of an input that is read for the last time.

The gradient that leaves a region of equal layers is as large as the one that comes in. A loop that
reads a tangent by chunks and writes the same rows of a buffer later in the same body may write them
over the tangent, so that one tensor serves the backward of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxmem.program import body_ops as runtime
from fxmem.program.steps import Buffer, Loop, Program
from fxmem.rewriting.aliases import readers
from fxmem.rewriting.straight import tensors


@dataclass(frozen=True, slots=True)
class ReuseTangents:
    """Let buffers replace inputs among ``inputs``, each of them at most once."""

    inputs: tuple[str, ...]
    name: str = "reuse_tangents"

    def run(self, program: Program) -> Program:
        found: dict[str, str] = {}
        for loop in program.loops:
            for buffer in loop.allocate:
                for name in self.inputs:
                    if name not in found.values() and _may_replace(program, loop, buffer, name):
                        found[buffer.name] = name
                        break
        return replace(program, overwrites=found)


def _may_replace(program: Program, loop: Loop, buffer: Buffer, name: str) -> bool:
    if buffer.zero or buffer.dtype != buffer.result:
        return False
    if program.shapes[name] != (buffer.shape, buffer.dtype) or name in program.outputs:
        return False
    reading = [s for s in (*program.steps, *program.masks) if name in getattr(s, "tensors", ())]
    return reading == [loop] and _read_before_written(loop, name, buffer.name)


def _read_before_written(loop: Loop, read: str, written: str) -> bool:
    """Both are used by whole chunks only, and no alias of the chunk read is used after the write.

    Each iteration then touches rows that no other one does, in whatever order they run.
    """
    nodes = list(loop.module.graph.nodes)
    given = tensors(loop.module.graph, loop.tensors)
    writes, takes = list(given[written].users), list(given[read].users)
    if len(writes) != 1 or writes[0].target is not runtime.put or len(writes[0].args) != 4:
        return False
    write = writes[0]
    buffer, _, dim, start = write.args
    low = nodes[len(loop.ints) + (loop.bounds.index("at") if "at" in loop.bounds else 0)]
    if buffer is not given[written] or start is not low:
        return False
    if any(t.target is not runtime.take or t.args[1:3] != (dim, low) or len(t.args) != 4
           for t in takes):  # fmt: skip
        return False
    order = {n: i for i, n in enumerate(nodes)}
    return all(order[n] <= order[write] for t in takes for n in readers(t))
