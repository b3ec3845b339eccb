"""Values of a chunk body on fake tensors whose lengths are symbols: how they lie in memory.

Nothing is computed. What the body's own functions return is described in :data:`_FAKES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxmem import runtime
from fxmem._compat_inductor import Symbolic
from fxmem.kernels import attention, dropout, token_nll
from fxmem.program import Loop
from fxmem.sizes import Size

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
    sizes = Symbolic.of({**hints, "lo": _TYPICAL["lo"], "rows": _TYPICAL["rows"]})
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
    rule = _FAKES.get(node.target)
    return rule(*args, **kwargs) if rule is not None else node.target(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, h, c, _e = q.shape
    out = q.new_empty((b, c, h, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((b, h, c), dtype=torch.promote_types(q.dtype, torch.float32))


def _nothing(*_: Any) -> None:
    return None


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] + before + after
    return x.new_empty(shape)


_FAKES: dict[Any, Callable[..., Any]] = {
    attention.forward: _attention,
    attention.backward: lambda dout, q, *_: q.new_empty(q.shape),
    attention.causal_spans: _nothing,
    attention.full_spans: _nothing,
    attention.explicit_spans: _nothing,
    token_nll.forward_: lambda x, *_: (x.new_empty(x.shape[:1]), x.new_empty(x.shape[:1])),
    token_nll.backward_: lambda grad, x, *_: x.new_empty(x.shape),
    token_nll.backward: lambda grad, x, *_: x.new_empty(x.shape),
    runtime.pad_rows: _padded,
    dropout.chunk: lambda x, *_: x.new_empty(x.shape),
    **dict.fromkeys(
        (
            runtime.put, runtime.add, runtime.add_mm, runtime.add_bmm, runtime.add_embedding,
            runtime.add_expert_weight,
        ),
        _nothing,
    ),
}  # fmt: skip
"""Results of functions that are not run on fake tensors; their real results are laid out alike by
:func:`fxmem.runtime.laid_out`.
"""
