"""The form of a segment: what it computes, without its constants and the names of its sizes.

Segments of equal form differ in the widths of a model alone, so compiled code can serve several of
them: other layers, other models, other pruned widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxmem._compat.inductor import Symbolic, statically_known_true
from fxmem.axes.sizes import Size, number
from fxmem.backends.segments import Segment

Lifted = tuple[int, Size]
"""``constants[i] * rest``; a constant below 2 is never lifted, and then ``i`` is -1."""


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """An input on fake tensors."""

    shape: tuple[Lifted, ...]
    stride: tuple[Lifted, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class Form:
    """A segment over canonical names.

    Attributes:
        key: equal for segments that one compiled code may serve.
        constants: the lifted constants, in order.
        names: sizes of the body that it reads, in the order of the code's arguments.
        tensors: its tensor inputs, in order; ``sizes``: the others, as sizes.
        free: positions among the tensors whose memory a result may take.
    """

    key: tuple[Any, ...]
    constants: tuple[int, ...]
    names: list[str]
    hints: list[int]
    tensors: list[fx.Node]
    metas: list[TensorMeta]
    sizes: dict[fx.Node, Lifted]
    free: tuple[int, ...]
    segment: Segment

    @classmethod
    def of(cls, segment: Segment, values: Mapping[fx.Node, Any], outer: Symbolic) -> Form:
        """``values``: of the body on fake tensors over the sizes of ``outer``."""
        lift = _Lift()
        tensors = [n for n in segment.inputs if isinstance(values[n], Tensor)]
        metas = [lift.meta(values[n], outer) for n in tensors]
        others = [n for n in segment.inputs if not isinstance(values[n], Tensor)]
        sizes = {n: lift.size(outer.expr(values[n])) for n in others}
        free = tuple(
            i for i, n in enumerate(tensors)
            if n in segment.donated and values[n].is_contiguous()
        )  # fmt: skip
        number = {n: i for i, n in enumerate((*tensors, *others, *segment.nodes))}
        nodes = tuple(
            (str(n.target), lift.structure(n.args, number), lift.structure(n.kwargs, number))
            for n in segment.nodes
        )
        outputs = tuple(number[n] for n in segment.outputs)
        key = (tuple(metas), tuple(sizes.values()), nodes, outputs, free)
        hints = [outer.hints[n] for n in lift.names]
        return cls(
            key, tuple(lift.constants), list(lift.names), hints, tensors, metas, sizes, free,
            segment,
        )  # fmt: skip

    def run(self, ints: Sequence[Any], constants: Sequence[Any], tensors: Sequence[Any]) -> Any:
        """The segment's operators, with these sizes and constants."""
        named = dict(zip(map(canonical, range(len(ints))), ints, strict=True))
        env: dict[fx.Node, Any] = {n: evaluate(s, constants, named) for n, s in self.sizes.items()}
        env.update(zip(self.tensors, tensors, strict=True))
        pending = iter(constants[len(constants) - self._in_nodes :])
        for node in self.segment.nodes:
            args, kwargs = (_fill(a, env, pending) for a in (node.args, node.kwargs))
            target = _reshape if node.target is torch.ops.aten.reshape.default else node.target
            env[node] = target(*args, **kwargs)
        return tuple(env[n] for n in self.segment.outputs)

    @property
    def _in_nodes(self) -> int:
        """How many constants stand in operators' arguments: the last ones."""
        return sum(_count((n.args, n.kwargs)) for n in self.segment.nodes)


@dataclass(slots=True)
class _Lift:
    constants: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)

    def size(self, expr: Size) -> Lifted:
        factor, rest = expr.as_coeff_Mul()
        for symbol in sorted(rest.free_symbols, key=str):
            self.names.setdefault(str(symbol), len(self.names))
        renamed = rest.xreplace(
            {
                s: sympy.Symbol(canonical(self.names[str(s)]), integer=True)
                for s in rest.free_symbols
            }
        )
        if not factor.is_Integer or factor < 2:
            return -1, factor * renamed
        self.constants.append(int(factor))
        return len(self.constants) - 1, renamed

    def meta(self, x: Tensor, outer: Symbolic) -> TensorMeta:
        shape, stride = (
            tuple(self.size(outer.expr(n)) for n in ns) for ns in (x.shape, x.stride())
        )
        return TensorMeta(shape, stride, x.dtype, x.device)

    def structure(self, value: Any, number: Mapping[fx.Node, int]) -> Any:
        """Arguments without their lifted constants, hashable."""
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (tuple, list)):
            return tuple(self.structure(v, number) for v in value)
        if isinstance(value, dict):
            return tuple((k, self.structure(v, number)) for k, v in value.items())
        if _lifted(value):
            self.constants.append(value)
            return "constant"
        return (type(value).__name__, value)


def _reshape(x: Tensor, shape: Sequence[Any]) -> Tensor:
    """Reshape that copies wherever the rows of two sequences may lie apart.

    They do unless the chunk is the whole sequence; a trace of ``aten.reshape`` holds for one of the
    two.
    """
    if x.dim() > 1 and not statically_known_true(shape[0] == x.shape[0]):
        together = statically_known_true(x.stride(0) == x.shape[1] * x.stride(1))
        if not together:
            x = torch.ops.aten.clone.default(x, memory_format=torch.contiguous_format)
    return torch.ops.aten.reshape.default(x, shape)


def canonical(i: int, letter: str = "n") -> str:
    """The name of the i-th size of a form, or with ``w`` of its i-th constant that varies."""
    return f"{letter}{i}"


def _lifted(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _count(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_count, value))
    return sum(map(_count, value.values())) if isinstance(value, dict) else int(_lifted(value))


def _fill(value: Any, env: Mapping[fx.Node, Any], constants: Any) -> Any:
    """Arguments with the values of nodes, and the next constants for those lifted."""
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (tuple, list)):
        filled = [_fill(v, env, constants) for v in value]
        return filled if isinstance(value, list) else tuple(filled)
    if isinstance(value, dict):
        return {k: _fill(v, env, constants) for k, v in value.items()}
    return next(constants) if _lifted(value) else value


def evaluate(size: Lifted, constants: Sequence[Any], names: Mapping[str, Any]) -> Any:
    """A lifted size with ints or symbolic ints for constants and names."""
    at, rest = size
    return number(rest, names) if at < 0 else constants[at] * number(rest, names)
