"""Attention of a query chunk against keys and values, with its logsumexp and its backward.

Letters: B batch, H query heads, G key/value heads (H = n G), C query rows, S keys, E head size, F
value size.

A chunk of queries sees its keys as *spans*: a run of keys that every query row sees, one whose
upper triangle is hidden (the chunk against itself), or one with an explicit mask tile. Each span is
one call of an attention kernel; results are merged by logsumexp, which is exact. In the backward
every span uses the logsumexp of the whole row, so its part of the gradient is final
(FlashAttention-2, section 3.1). No tensor of C x S elements is made where a fused kernel exists,
and grouped heads are never repeated in memory: the n query heads of a group are stacked as rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmem.errors import VerificationError
from fxmem.kernels.layout import rows_last
from fxmem.program.body_op import body_op, nothing

MATH_TILE = 1024  # keys per tile where scores are formed explicitly


@dataclass(frozen=True, slots=True)
class Span:
    """Keys ``[start, stop)``: ``mask`` (bool or additive, ``[B|1, H|1, C, keys]``), or the causal
    diagonal.
    """

    start: int
    stop: int
    mask: Tensor | None = None
    diagonal: bool = False


@body_op(fake=nothing)
def causal_spans(lo: int, hi: int) -> tuple[Span, ...]:
    """Spans of query rows ``[lo, hi)`` under a causal mask of equal query and key positions."""
    past = (Span(0, lo),) if lo else ()
    return (*past, Span(lo, hi, diagonal=True))


@body_op(fake=nothing)
def full_spans(k: Tensor) -> tuple[Span, ...]:
    """Every query row sees every key."""
    return (Span(0, k.shape[2]),)


@body_op(aliases=(0,), fake=nothing)
def explicit_spans(mask: Tensor) -> tuple[Span, ...]:
    """Rows of a mask that is given for the chunk as it is."""
    return (Span(0, mask.shape[-1], mask),)


def _fused(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _stack(x: Tensor, groups: int) -> Tensor:
    """``[B, H, C, E] -> [B, G, n C, E]``"""
    b, h, c, e = x.shape
    return x if h == groups else x.reshape(b, groups, h // groups * c, e)


def _stack_mask(mask: Tensor, q: Tensor, groups: int) -> Tensor:
    """The mask for stacked rows, ``[B|1, G|1, n C, keys]``."""
    n = q.shape[1] // groups
    if n == 1:
        return mask
    b, h, c, s = mask.shape
    if h == 1:
        return mask.unsqueeze(2).expand(b, 1, n, c, s).reshape(b, 1, n * c, s)
    return mask.reshape(b, groups, n * c, s)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def _bias(mask: Tensor, q: Tensor, groups: int) -> Tensor:
    """What a mask adds to the scores of stacked rows."""
    return rows_last(_stack_mask(_additive(mask, q.dtype), q, groups))


def visible_rows(mask: Tensor) -> Tensor:
    """Which rows see any key."""
    return mask.any(-1) if mask.dtype == torch.bool else (mask > -math.inf).any(-1)


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, G, S, E] -> [B G, n, S, E]`` without a copy: heads of a group share storage."""
    b, g, s, e = x.shape
    return x.reshape(b * g, 1, s, e).expand(b * g, heads // g, s, e)


def _pieces(spans: Sequence[Span], fused: bool) -> list[Span]:
    spans = [s for s in spans if s.stop > s.start]
    if fused:
        return spans
    out = []
    for span in spans:
        if span.diagonal:
            out.append(span)
            continue
        for a in range(span.start, span.stop, MATH_TILE):
            b = min(a + MATH_TILE, span.stop)
            mask = None if span.mask is None else span.mask[..., a - span.start : b - span.start]
            out.append(Span(a, b, mask))
    return out


def _span_mask(q: Tensor, span: Span) -> Tensor | None:
    c = q.shape[2]
    if span.mask is not None:
        return span.mask.expand(*span.mask.shape[:2], c, span.stop - span.start)
    if not span.diagonal:
        return None
    return torch.ones(1, 1, c, c, dtype=torch.bool, device=q.device).tril_()


def _forward_span(
    q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """``(out [B, H, C, F], lse [B, H, C])`` of a span; rows that see nothing have lse ``-inf``."""
    b, h, c, _ = q.shape
    groups = k.shape[1]
    k, v = k[:, :, span.start : span.stop], v[:, :, span.start : span.stop]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if _fused(q, v) and span.diagonal:
        out, lse = flash(
            q.reshape(b * groups, h // groups, c, -1),
            _expand_heads(k, h),
            _expand_heads(v, h),
            0.0,
            True,
            scale=scale,
        )
        return out.reshape(b, h, c, -1), lse.reshape(b, h, c)
    mask = _span_mask(q, span)
    rows = _stack(q, groups)
    bias = None if mask is None else _bias(mask, q, groups)
    if _fused(q, v):
        out, lse = flash(rows, k, v, 0.0, False, attn_mask=bias, scale=scale)
    else:
        scores = (
            (rows @ k.transpose(-1, -2)).float()
            if q.dtype.itemsize < 4
            else rows @ k.transpose(-1, -2)
        )
        scores = scores * scale if bias is None else scores * scale + bias
        lse = torch.logsumexp(scores, -1)
        out = (scores - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp().to(v.dtype) @ v
    out, lse = out.reshape(b, h, c, -1), lse.reshape(b, h, c)
    if mask is not None:
        lse = lse.masked_fill(~visible_rows(mask), -math.inf)
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    b, h, c, _e = q.shape
    out = q.new_empty((b, c, h, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((b, h, c), dtype=torch.promote_types(q.dtype, torch.float32))


@body_op(fake=_fake)
def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, C, E]`` over the given spans of ``k``, ``v``; returns ``(out, lse)``.

    Rows that see no key give zeros and a logsumexp of 0.
    """
    b, h, c, _ = q.shape
    _check(q, k, v)
    q, k, v = map(rows_last, (q, k, v))
    parts = (
        [_forward_span(q, k, v, s, scale) for s in _pieces(spans, _fused(q, v))]
        if q.numel()
        else []
    )
    if not parts:
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(b, h, c, v.shape[-1]), q.new_zeros(b, h, c, dtype=wide)
    return merge(parts, q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """A fused kernel reads beyond K and V of other sizes."""
    alike = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not alike or (k.shape[1] and q.shape[1] % k.shape[1]):
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise VerificationError(f"attention of queries, keys and values of shapes {shapes}")


def merge(parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention over all keys from that over parts of them; empties the list."""
    if len(parts) == 1:
        out, lse = parts[0]
        return out, lse.masked_fill(lse == -math.inf, 0.0)
    lse = torch.logsumexp(torch.stack([p[1] for p in parts]), 0)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    total: Tensor | None = None
    while parts:
        out, part = parts.pop()
        weighted = out * (part - lse).exp_().unsqueeze(-1)
        total = weighted if total is None else total.add_(weighted)
    assert total is not None
    return total.to(dtype), lse


def _backward_span(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    span: Span,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, c, _ = q.shape
    groups = k.shape[1]
    k, v = k[:, :, span.start : span.stop], v[:, :, span.start : span.stop]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if _fused(q, v) and span.diagonal:
        n = h // groups
        split = (b * groups, n, c)
        dq, dk, dv = flash(
            dout.reshape(*split, -1), q.reshape(*split, -1),
            _expand_heads(k, h), _expand_heads(v, h),
            out.reshape(*split, -1), lse.reshape(split), 0.0, True, scale=scale,
        )  # fmt: skip
        if n > 1:
            dk, dv = dk.sum(1), dv.sum(1)
        return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
    mask = _span_mask(q, span)
    bias = None if mask is None else _bias(mask, q, groups)
    dout, rows, out = _stack(dout, groups), _stack(q, groups), _stack(out, groups)
    lse = lse.reshape(b, groups, -1)
    if _fused(q, v):
        dq, dk, dv = flash(dout, rows, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (rows @ k.transpose(-1, -2)).to(wide) * scale
        p = ((scores if bias is None else scores + bias) - lse.unsqueeze(-1)).exp_()
        delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        ds = ((dout @ v.transpose(-1, -2)).to(wide).sub_(delta).mul_(p).mul_(scale)).to(q.dtype)
        dv = p.to(dout.dtype).transpose(-1, -2) @ dout
        dq, dk = ds @ k, ds.transpose(-1, -2) @ rows
    return dq.reshape(q.shape), dk, dv


@body_op(writes=(6, 7), fake=lambda dout, q, *_: q.new_empty(q.shape))
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dk: Tensor, dv: Tensor, spans: Sequence[Span], scale: float,
) -> Tensor:  # fmt: skip
    """Adds into ``dk``, ``dv`` (``[B, G, S, *]``, any float type); returns ``dq [B, H, C, E]``."""
    total: Tensor | None = None
    _check(q, k, v)
    dout, q, k, v, out = map(rows_last, (dout, q, k, v, out))
    for span in _pieces(spans, _fused(q, v)) if q.numel() else ():
        dq, dk_part, dv_part = _backward_span(dout, q, k, v, out, lse, span, scale)
        dk[:, :, span.start : span.stop] += dk_part
        dv[:, :, span.start : span.stop] += dv_part
        total = dq if total is None else total.add_(dq)
    return torch.zeros_like(q) if total is None else total


def _whole_spans(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> tuple[Span, ...]:
    c, s = q.shape[2], k.shape[2]
    if mask is not None:
        return (Span(0, s, mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))),)
    if not causal:
        return (Span(0, s),)
    if c == s:
        return causal_spans(0, c)
    return (Span(0, s, torch.ones(1, 1, c, s, dtype=torch.bool, device=q.device).tril_()),)


@torch.library.custom_op("fxmem::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Canonical attention ``q [B, H, C, E]``, ``k [B, G, S, E]``, ``v [B, G, S, F]`` -> ``(out,
    lse)``.

    ``causal`` is aligned top-left, as in ``scaled_dot_product_attention``; ``mask`` is bool or
    additive.
    """
    out, lse = forward(q, k, v, _whole_spans(q, k, mask, causal), scale)
    return out.contiguous(), lse.contiguous()


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    b, h, c, _ = q.shape
    lse = q.new_empty((b, h, c), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((b, h, c, v.shape[-1])), lse


@torch.library.custom_op("fxmem::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`attention` with respect to ``q``, ``k`` and ``v``."""
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    dq = backward(dout, q, k, v, out, lse, dk, dv, _whole_spans(q, k, mask, causal), scale)
    return dq.contiguous(), dk, dv


@attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, mask, causal, scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.causal, ctx.scale = causal, scale
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx, dout, _dlse):
    q, k, v, mask, out, lse = ctx.saved_tensors
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, mask, ctx.causal, ctx.scale)
    return dq, dk, dv, None, None, None


attention.register_autograd(_vjp, setup_context=_setup)
