"""Shifts: rows moved along the streamed axis by a constant, as one op that hands a few rows on.

People write ``pad(x[:, :-1], ...)`` or ``cat([zeros, x[:, :-1]])``, and autograd pads and slices
back. Each step alone moves rows out of their chunks; a chain that drops as many rows at one end as
it adds zeros at the other is a delay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxmem.axes.sizes import has_axis, same, size
from fxmem.frontend.joint import Joint
from fxmem.kernels import carried  # noqa: F401  (registers the ops)
from fxmem.rewriting.patterns import is_op
from fxmem.rewriting.pipeline import Edit, LocalPass
from fxmem.rules.movement import position
from fxmem.streaming.labels import call_of

_ZEROS = ("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default",
          "aten.full.default", "aten.full_like.default")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shifts(LocalPass[Joint]):
    """Rewrite chains of slices and zero pads that keep the length."""

    name: str = "shifts"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        known: dict[fx.Node, Moved] = {}
        for node in list(joint.graph.nodes):
            moved = _moved(joint, node, known) if node in joint.learned else None
            if moved is not None:
                known[node] = moved
                if rows := moved.delay:
                    yield partial(_delay, joint, node, moved, rows)
        joint.graph.eliminate_dead_code()


@dataclass(frozen=True, slots=True)
class Moved:
    """Rows of ``root`` along ``dim``: without the first ``top`` and the last ``bottom``, between
    ``before`` and ``after`` rows of zeros."""

    root: fx.Node
    dim: int
    top: int = 0
    bottom: int = 0
    before: int = 0
    after: int = 0

    def and_then(self, front: int, back: int) -> Moved:
        """Rows added at both ends, or dropped where the number is negative."""
        top, before = _end(self.top, self.before, front)
        bottom, after = _end(self.bottom, self.after, back)
        return Moved(self.root, self.dim, top, bottom, before, after)

    @property
    def delay(self) -> int:
        """How many rows later each row stands; 0 where this is more than that."""
        ends = (self.top, self.bottom, self.before, self.after)
        if ends == (0, self.before, self.before, 0):
            return self.before
        return -self.top if ends == (self.top, 0, 0, self.top) else 0


def _end(dropped: int, zeros: int, change: int) -> tuple[int, int]:
    left = zeros + change
    return (dropped, left) if left >= 0 else (dropped - left, 0)


def _moved(joint: Joint, node: fx.Node, known: dict[fx.Node, Moved]) -> Moved | None:
    step = _step(joint, node)
    if step is None:
        return None
    source, dim, front, back = step
    so_far = known.get(source)
    if so_far is None or so_far.dim != dim:
        so_far = Moved(source, dim)
    return so_far.and_then(front, back)


def _step(joint: Joint, node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """``(source, dim, rows added in front, rows added behind)`` along the streamed axis."""
    if is_op(node, "aten.slice.Tensor", "aten.slice_backward.default"):
        return _slice(joint, node)
    if is_op(node, "aten.constant_pad_nd.default"):
        return _pad(joint, node)
    return _cat(joint, node) if is_op(node, "aten.cat.default") else None


def _slice(joint: Joint, node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    call, source = call_of(node, joint), node.args[0]
    back = str(node.target) == "aten.slice_backward.default"
    at, step = (2, call.arg(5, 1)) if back else (1, call.arg(4, 1))
    whole, part = (call.out, call.tensors[0]) if back else (call.tensors[0], call.out)
    dim = call.arg(at, 0) % whole.rank
    start = position(call.arg(at + 1), whole.shape[dim])
    assert isinstance(source, fx.Node)
    if step != 1 or start is None or not start.is_Integer or not has_axis(whole.shape[dim]):
        return None
    rest = _number(whole.shape[dim] - part.shape[dim] - start)
    sign = 1 if back else -1
    return None if rest is None else (source, dim, sign * int(start), sign * rest)


def _pad(joint: Joint, node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    call, source = call_of(node, joint), node.args[0]
    pads = [_number(p) for p in call.args[1]]  # before and after, from the last axis on
    ends = list(zip(pads[::2], pads[1::2], strict=True))
    padded = [i for i, end in enumerate(ends) if end != (0, 0)]
    if call.arg(2, 0) != 0 or len(padded) != 1:
        return None
    (front, back), dim = ends[padded[0]], call.out.rank - 1 - padded[0]
    assert isinstance(source, fx.Node)
    if front is None or back is None or not has_axis(call.out.shape[dim]):
        return None
    return source, dim, front, back


def _cat(joint: Joint, node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    parts: Any = node.args[0]
    rank = joint.info[node].rank
    dim = int(node.args[1] if len(node.args) > 1 else 0) % rank
    zeros = [is_zero(p) for p in parts]
    if len(parts) != 2 or sum(zeros) != 1 or not has_axis(joint.info[node].shape[dim]):
        return None
    (source,) = (p for p, z in zip(parts, zeros, strict=True) if not z)
    rows = _number(joint.info[parts[zeros.index(True)]].shape[dim])
    if rows is None or not has_axis(joint.info[source].shape[dim]):
        return None
    return (source, dim, rows, 0) if zeros[0] else (source, dim, 0, rows)


def is_zero(node: fx.Node) -> bool:
    """It is made of zeros."""
    fills = [a for a in node.args[1:] if isinstance(a, (int, float))]
    full = "full" in str(node.target)
    return is_op(node, *_ZEROS) and (not full or fills[-1:] in ([0], [0.0]))


def _number(value: Any) -> int | None:
    expr = size(value)
    return int(expr) if expr.is_Integer else None


def _delay(joint: Joint, node: fx.Node, moved: Moved, rows: int) -> None:
    assert same(joint.info[node].shape[moved.dim], joint.info[moved.root].shape[moved.dim])
    op = torch.ops.fxmem.delay.default
    joint.replace(node, joint.first_of(node, op, (moved.root, moved.dim, rows)))
