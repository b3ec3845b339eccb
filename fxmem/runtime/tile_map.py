"""Attention masks as structure: which keys a chunk of queries sees, tile by tile.

A mask is never built as a ``T x T`` tensor. Its rows are evaluated chunk by chunk, once per call of
the model, and each tile of keys is classified: seen by every row, by none, or by some. Runs of full
tiles become spans without a mask, empty tiles disappear, only mixed tiles keep their (small) piece
of the mask. Causality, sliding windows, padding and packed documents all show up this way, whatever
formula the model used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmem.kernels.attention import Span

_LOW = -1e3


@dataclass(frozen=True, slots=True)
class TileMap:
    """Spans per chunk of queries, and whether no chunk sees keys after its own last row."""

    spans: tuple[tuple[Span, ...], ...]
    causal: bool
    full: int
    mixed: int
    empty: int


def build(rows: Callable[[int, int], Tensor], chunks: Sequence[tuple[int, int]]) -> TileMap:
    """Classify a mask. ``rows(lo, hi)`` gives ``[B|1, H|1, hi - lo | 1, S]``, bool or additive."""
    spans, causal = [], True
    counts = {"full": 0, "mixed": 0, "empty": 0}
    for lo, hi in chunks:
        mask = rows(lo, hi)
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        mask = mask.expand(*mask.shape[:2], hi - lo, mask.shape[-1])
        found = _classify(mask, lo, max(b - a for a, b in chunks), counts)
        causal = causal and all(s.stop <= hi or not _sees(s, hi) for s in found)
        spans.append(tuple(_trim(s, hi) if causal else s for s in found))
    return TileMap(tuple(spans), causal, counts["full"], counts["mixed"], counts["empty"])


def _classify(mask: Tensor, lo: int, tile: int, counts: dict[str, int]) -> list[Span]:
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    plain = mask if mask.dtype == torch.bool else mask == 0
    if _lowers_a_row(mask):
        counts["mixed"] += -(-mask.shape[-1] // tile)
        return [Span(0, mask.shape[-1], mask.contiguous())]
    some, all_ = seen.flatten(0, 2).any(0), plain.flatten(0, 2).all(0)
    out: list[Span] = []
    for a in range(0, mask.shape[-1], tile):
        b = min(a + tile, mask.shape[-1])
        if not bool(some[a:b].any()):
            counts["empty"] += 1
        elif bool(all_[a:b].all()):
            counts["full"] += 1
            if out and out[-1].mask is None and out[-1].stop == a:
                out[-1] = Span(out[-1].start, b)
            else:
                out.append(Span(a, b))
        else:
            counts["mixed"] += 1
            if a == lo and _diagonal(seen[..., a:b], plain[..., a:b]):
                out.append(Span(a, b, diagonal=True))
            else:
                out.append(Span(a, b, mask[..., a:b].contiguous()))
    return out


def _lowers_a_row(mask: Tensor) -> bool:
    """Some row has nothing but low numbers (the lowest of its type, instead of minus infinity):
    spans of its keys could not be merged, since its logsumexp has lost their sizes.
    """
    if mask.dtype == torch.bool or not mask.numel():
        return False
    highest = mask.amax(-1)
    return bool(((highest < _LOW) & (highest > -torch.inf)).any())


def _diagonal(seen: Tensor, plain: Tensor) -> bool:
    """Every row sees exactly the keys up to its own: kernels skip the others."""
    c, s = seen.shape[-2:]
    if c != s:
        return False
    triangle = torch.ones(c, s, dtype=torch.bool, device=seen.device).tril_()
    return bool((seen == triangle).all()) and bool((plain == triangle).all())


def _sees(span: Span, stop: int) -> bool:
    """Some row sees a key at or after ``stop``."""
    if span.mask is None:
        return span.stop > stop
    late = span.mask[..., max(stop - span.start, 0) :]
    return bool((late if late.dtype == torch.bool else late > -torch.inf).any())


def _trim(span: Span, stop: int) -> Span:
    """The span without keys at or after ``stop``, which no row sees."""
    if span.stop <= stop or span.start >= stop:
        return span
    return Span(
        span.start,
        stop,
        None if span.mask is None else span.mask[..., : stop - span.start].contiguous(),
    )
