"""Kernels in the form in which chunk bodies call them: any leading dimensions, spans of keys.

Each function starts the Triton kernel; a pass puts it into a body only where the kernel is
available (:meth:`~fxmem.kernels.registry.Kernel.available`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxmem.kernels import (
    attention,
    chunk_attention,
    chunk_attention_backward,
    linear_nll,
    linear_nll_backward,
)
from fxmem.kernels import gated as gated_kernel
from fxmem.kernels import norm as norm_kernel
from fxmem.kernels import rotary as rotary_kernel
from fxmem.kernels import weight_grad as weight_grad_kernel
from fxmem.kernels.attention import Span
from fxmem.program.body_op import adds, body_op


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@body_op()
def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x [.., D]`` with ``weight`` of D elements: ``(y [.., D], rstd [.., 1])``."""
    y, rstd, _ = norm_kernel.launcher(_rows(x), weight.reshape(-1), eps=eps)
    return y.reshape(x.shape), rstd.reshape(*x.shape[:-1], 1)


@body_op(writes=(4,))
def norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, dweight: Tensor | None = None
) -> Tensor:
    """Gradient of ``x``, all ``[.., D]``; adds that of the weight into ``dweight``, float32."""
    dx = norm_kernel.launcher_backward(
        _rows(dy), _rows(x), rstd.reshape(-1).float(), None, weight.reshape(-1),
        dweight=None if dweight is None else dweight.view(-1),
    )  # fmt: skip
    return dx.reshape(x.shape)


@body_op()
def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``aten.native_layer_norm`` over the last dimension: ``(y, mean, rstd)``."""
    y, rstd, mean = norm_kernel.launcher(_rows(x), weight, bias, eps=eps, center=True)
    assert mean is not None
    rows = (*x.shape[:-1], 1)
    return y.reshape(x.shape), mean.reshape(rows), rstd.reshape(rows)


@body_op()
def layer_norm_backward(
    dy: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, mask: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As ``aten.native_layer_norm_backward``: ``(dx, dweight, dbias)``, the latter two float32."""
    dweight, dbias = (
        torch.zeros(x.shape[-1], dtype=torch.float32, device=x.device) if wanted else None
        for wanted in mask[1:]
    )
    dx = norm_kernel.launcher_backward(
        _rows(dy), _rows(x), rstd.reshape(-1).float(), mean.reshape(-1).float(), weight,
        dweight=dweight, dbias=dbias,
    )  # fmt: skip
    return dx.reshape(x.shape), dweight, dbias


@body_op()
def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) * up``, all ``[.., I]``."""
    return gated_kernel.launcher(_rows(gate), _rows(up), act=act).reshape(gate.shape)


@body_op()
def gated_backward(dout: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """``(dgate, dup)``, all ``[.., I]``."""
    dgate, dup, _ = gated_kernel.launcher_backward(_rows(dout), _rows(gate), _rows(up), act=act)
    return dgate.reshape(gate.shape), dup.reshape(up.shape)


@body_op()
def rotary(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool = False) -> Tensor:
    """``x [B, H, T, E]`` turned by ``cos``, ``sin`` ``[B|1, 1, T, E]``."""
    return rotary_kernel.launcher(x, cos[:, 0], sin[:, 0], transpose=transpose)


@adds("product")
def weight_grad(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """``acc += a @ b``, ``acc`` float32."""
    if a.shape[1]:
        weight_grad_kernel.launcher(acc, a.t(), b)


def _pieces(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """``(span, offset)``: the past and the diagonal after it are one causal prefix."""
    out: list[tuple[Span, int]] = []
    for span in spans:
        past = out[-1][0] if out else None
        joins = past is not None and past.mask is None and not past.diagonal
        if span.diagonal and joins and past is not None and past.stop == span.start:
            out[-1] = (Span(past.start, span.stop, diagonal=True), span.start - past.start)
        else:
            out.append((span, 0))
    return out


@body_op()
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scale: float
) -> tuple[Tensor, Tensor]:
    """As :func:`fxmem.kernels.attention.forward`."""
    parts = []
    for span, offset in _pieces(spans):
        out, lse = chunk_attention.launcher(
            q, k[:, :, span.start : span.stop], v[:, :, span.start : span.stop], scale=scale,
            offset=offset, causal=span.diagonal, mask=span.mask,
        )  # fmt: skip
        if span.mask is not None:
            lse = lse.masked_fill(~attention.visible_rows(span.mask), -math.inf)
        parts.append((out, lse))
    if not parts:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(q.shape[:3], dtype=torch.float32)
    return attention.merge(parts, q.dtype)


@body_op(writes=(6, 7))
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dk: Tensor, dv: Tensor, spans: Sequence[Span], scale: float,
) -> Tensor:  # fmt: skip
    """As :func:`fxmem.kernels.attention.backward`; ``dk``, ``dv`` float32."""
    total: Tensor | None = None
    for span, offset in _pieces(spans):
        keys = slice(span.start, span.stop)
        dq, _ = chunk_attention_backward.launcher(
            dout, q, k[:, :, keys], v[:, :, keys], out, lse, dk[:, :, keys], dv[:, :, keys],
            scale=scale, offset=offset, causal=span.diagonal, mask=span.mask,
        )  # fmt: skip
        total = dq if total is None else total.add_(dq)
    return torch.zeros_like(q) if total is None else total


@body_op()
def token_nll(
    h: Tensor, weight_t: Tensor, target: Tensor, ignore_index: int, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``(nll [N], entropy [N], lse [N])`` of the logits ``h [N, D] @ weight_t [D, V]``, which are
    not formed.
    """
    logp, entropy, lse, _ = linear_nll.launcher(
        h, weight_t.t(), None, target[:, None], ignore_index=ignore_index, softcap=softcap
    )
    return -logp[:, 0], entropy, lse


@body_op(writes=(8,))
def token_nll_backward(
    grad: Tensor, h: Tensor, weight_t: Tensor, target: Tensor, entropy: Tensor, lse: Tensor,
    ignore_index: int, softcap: float, dweight: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gradient of ``h``; adds that of the weight into ``dweight [V, D]``, float32."""
    dlogp = (-grad.float())[:, None].contiguous()
    dh = linear_nll_backward.launcher(
        h, weight_t.t(), None, target[:, None], entropy, lse, dlogp, dweight=dweight,
        ignore_index=ignore_index, softcap=softcap,
    )  # fmt: skip
    assert dh is not None
    return dh
