"""Values of a chunk body on fake tensors whose lengths are symbols: how they lie in memory.

Nothing is computed. Functions that cannot run on fake tensors say what they return
(:class:`~fxmem.program.body_op.BodyOp`); their real results are laid out alike by
:func:`fxmem.program.body_ops.laid_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor, fx

from fxmem._compat.inductor import Symbolic
from fxmem.axes.sizes import Size
from fxmem.program import body_ops as runtime
from fxmem.program.body_op import BODY_OPS
from fxmem.program.steps import Loop

_TYPICAL = {"T": 8192, "lo": 3584, "rows": 512}


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of the dimensions in memory where they are dense, else the strides."""

    order: tuple[int, ...] = ()
    strides: tuple[int, ...] | None = None


def layout(x: Tensor) -> Layout:
    """How ``x`` lies in memory, without its sizes."""
    plain = tuple(range(x.dim()))
    if x.is_contiguous():
        return Layout(plain)
    order = tuple(sorted(plain, key=x.stride, reverse=True))
    return Layout(order) if x.permute(order).is_contiguous() else Layout(strides=x.stride())


def strides(shape: Sequence[Size], how: Layout) -> list[Size]:
    """Strides of a tensor of ``shape`` that lies so."""
    if how.strides is not None:
        return [sympy.Integer(s) for s in how.strides]
    out: list[Size] = [sympy.Integer(1)] * len(shape)
    step: Size = sympy.Integer(1)
    for d in reversed(how.order):
        out[d] = step
        step = step * shape[d]
    return out


def propagate(
    loop: Loop, shapes: Sequence[Sequence[Size]], tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
) -> tuple[dict[fx.Node, Any], Symbolic]:  # fmt: skip
    """Every value of the body on fake tensors with symbolic sizes."""
    hints = {name: _TYPICAL.get(name, 2 + i) for i, name in enumerate(loop.ints)}
    at = {"at": 1536} if "at" in loop.bounds else {}
    sizes = Symbolic.of({**hints, "lo": _TYPICAL["lo"], "rows": _TYPICAL["rows"], **at})
    given: dict[str, Any] = {**sizes.ints, "hi": sizes.ints["lo"] + sizes.ints["rows"]}
    for name, shape, x, how in zip(loop.tensors, shapes, tensors, layouts, strict=True):
        given[name] = sizes.tensor(shape, strides(shape, how), x.dtype, x.device)
    env: dict[fx.Node, Any] = {}
    with sizes.running():
        for node in loop.module.graph.nodes:
            if node.op == "placeholder":
                env[node] = given.get(node.target)
            elif node.op == "get_attr":
                env[node] = sizes.mode.from_tensor(getattr(loop.module, node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = _fake(node, args, kwargs, sizes)
    return env, sizes


def _fake(node: fx.Node, args: Any, kwargs: Any, sizes: Symbolic) -> Any:
    if node.target is runtime.clamp:
        # which of its operands a clamped row number equals differs from chunk to chunk
        return sizes.symbol(node.name, 300 + len(sizes.ints))
    known = BODY_OPS.get(node.target)
    rule = known.fake if known is not None else None
    return (rule or node.target)(*args, **kwargs)
