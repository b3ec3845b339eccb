"""Canonical attention: every call of ``scaled_dot_product_attention`` as ``fxmem::attention``.

The op takes four dimensions, K and V of one batch size and one number of heads with Q's, and either
a mask or causality of equal lengths. torch's function takes anything that broadcasts. What the op
cannot do (dropout on the weights, a mask that learns) is written out: product, softmax, product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxmem.axes.sizes import same, size
from fxmem.kernels.attention import attention as attention_op

Dropout = Callable[[Tensor, float], Tensor]


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool, dropout: Dropout,
) -> Tensor:  # fmt: skip
    """As ``torch.nn.functional.scaled_dot_product_attention``; ``dropout(weights, p)`` drops."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    rank = max(x.dim() for x in (query, key, value))
    # torch writes these out, too: where a mask adds the lowest number to a whole row, it is lost
    # in the row's logsumexp, not in its softmax
    added = attn_mask is not None and attn_mask.dtype != torch.bool
    written = added and (rank != 4 or query.shape[-1] != value.shape[-1])
    rest = (dropout_p, is_causal, scale, enable_gqa, dropout, written)
    if rank < 4:
        # the one leading dimension is a batch, unless grouped heads are asked for
        at = 0 if enable_gqa else 1
        q, k, v = (_padded(x, 3).unsqueeze(at) for x in (query, key, value))
        mask = attn_mask
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(at)
        out = _attention(q, k, v, mask, *rest).squeeze(at)
        return out.squeeze(0) if rank == 2 else out
    parts = [_padded(x, rank) for x in (query, key, value)]
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in parts))
    q, k, v = (_expanded(x, lead).flatten(0, -4) for x in parts)
    mask = attn_mask
    if mask is not None:
        mask = _padded(mask, rank)
        whole = any(s != 1 for s in mask.shape[:-3])
        mask = (_expanded(mask, lead) if whole else mask).flatten(0, -4)
    out = _attention(q, k, v, mask, *rest)
    return out if rank == 4 else out.reshape(*lead, *out.shape[1:])


def _padded(x: Tensor, rank: int) -> Tensor:
    """With dimensions of one in front."""
    return x if x.dim() == rank else x[(None,) * (rank - x.dim())]


def _expanded(x: Tensor, lead: Any) -> Tensor:
    """With these sizes in front."""
    if all(a is b or a == b for a, b in zip(x.shape, lead, strict=False)):
        return x
    return x.expand(*lead, *x.shape[len(lead) :])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float,
    gqa: bool, dropout: Dropout, written: bool,
) -> Tensor:  # fmt: skip
    q, k, v = _heads(q, k, v, gqa)
    equal = same(size(q.shape[-2]), size(k.shape[-2]))
    if causal and (mask is not None or not equal):
        mask, causal = _causal(mask, q, k), False
    if mask is not None:
        mask = _padded(mask, 4)
        if mask.shape[-1] == 1 and k.shape[-2] != 1:
            mask = mask.expand(*mask.shape[:-1], k.shape[-2])
    if written or p > 0 or (mask is not None and mask.requires_grad):
        return _written_out(q, k, v, mask, p, causal, scale, dropout)
    dtype = _autocast_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return attention_op(q, k, v, mask, causal, scale)[0]


def _heads(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One batch size; K and V with one number of heads, of which Q has a multiple.

    Heads that broadcast (one for all) are a group, too.
    """
    batch = torch.broadcast_shapes(*(x.shape[:1] for x in (q, k, v)))
    q, k, v = (_expanded(x, batch) for x in (q, k, v))
    groups = [x.shape[1] for x in (k, v)]
    heads = q.shape[1] if gqa else torch.broadcast_shapes(*(x.shape[1:2] for x in (q, k, v)))[0]
    if not gqa:
        q = _repeated(q, heads)
    if groups[0] == groups[1]:
        return q, k, v
    return q, _repeated(k, heads), _repeated(v, heads)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """``x`` with each head several times in a row, ``heads`` in all."""
    if x.shape[1] == heads:
        return x
    b, g, *rest = x.shape
    return x.unsqueeze(2).expand(b, g, heads // g, *rest).flatten(1, 2)


def _causal(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """``mask`` without keys after the query's own position, both counted from the start."""
    rows, columns = (torch.arange(x.shape[-2], device=q.device) for x in (q, k))
    seen = columns <= rows.unsqueeze(-1)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float,
    dropout: Dropout,
) -> Tensor:  # fmt: skip
    """Streams by its own labels (queries cut, keys whole). Rows that see no key give zeros."""
    k, v = (_repeated(x, q.shape[1]) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    if causal:
        mask = _causal(None, q, k)
    if mask is None:
        return dropout(torch.softmax(scores, -1), p) @ v
    masked = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, -math.inf) if masked else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    return dropout(weights, p) @ v


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype
