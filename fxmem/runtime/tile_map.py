"""Attention masks as structure: which keys a chunk of queries sees, tile by tile.

A mask is never built as a ``T x T`` tensor, and not for the rows of a chunk either. Its rows are
evaluated a few at a time, once per call of the model, and each tile of keys is classified: seen by
every row of the chunk, by none, or by some. Runs of full tiles become spans without a mask, empty
tiles disappear, only mixed tiles keep their (small) piece of the mask. Causality, sliding windows,
padding and packed documents all show up this way, whatever formula the model used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxmem.kernels.attention import Span

_LOW = -1e3
PIECE, PIECE_DEVICE = 1 << 19, 1 << 24
"""Elements of a mask that are evaluated at once: on a CPU, and on what has to be kept busy."""


@dataclass(frozen=True, slots=True)
class TileMap:
    """Spans per chunk of queries, and whether no chunk sees keys after its own last row."""

    spans: tuple[tuple[Span, ...], ...]
    causal: bool
    full: int
    mixed: int
    empty: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of a mask: which tiles a row of them sees, which all of them see, and the elements
    of the others. ``like``: a scalar of the mask's type; ``shape`` of the rows without the keys.
    """

    some: Tensor
    every: Tensor
    mixed: dict[int, Tensor]
    like: Tensor
    shape: tuple[int, ...]

    def elements(self, tile: int, every: bool, width: int) -> Tensor:
        """Of one tile."""
        if tile in self.mixed:
            return self.mixed[tile]
        seen, hidden = (True, False) if self.like.dtype == torch.bool else (0.0, -torch.inf)
        return self.like.new_full((), seen if every else hidden).expand(*self.shape, width)


def build(rows: Callable[[int, int], Tensor], chunks: Sequence[tuple[int, int]]) -> TileMap:
    """Classify a mask. ``rows(lo, hi)`` gives ``[B|1, H|1, hi - lo | 1, S]``, bool or additive."""
    spans, causal = [], True
    counts = {"full": 0, "mixed": 0, "empty": 0}
    tile = max((hi - lo for lo, hi in chunks), default=1)
    step = rows_at_once(rows(0, 1)) if chunks else 1
    for lo, hi in chunks:
        found = _classify(rows, lo, hi, step, tile, counts)
        causal = causal and all(s.stop <= hi or not _sees(s, hi) for s in found)
        spans.append(tuple(_trim(s, hi) if causal else s for s in found))
    return TileMap(tuple(spans), causal, counts["full"], counts["mixed"], counts["empty"])


def rows_at_once(row: Tensor) -> int:
    """How many rows like this one are evaluated together."""
    piece = PIECE if row.device.type == "cpu" else PIECE_DEVICE
    return max(1, piece // max(1, row.numel()))


def _classify(
    rows: Callable[[int, int], Tensor], lo: int, hi: int, step: int, tile: int,
    counts: dict[str, int],
) -> list[Span]:  # fmt: skip
    pieces = []
    for at in range(lo, hi, step):
        mask = _four(rows(at, end := min(at + step, hi)))
        if _lowers_a_row(mask):
            whole = _four(rows(lo, hi))
            counts["mixed"] += -(-mask.shape[-1] // tile)
            return [Span(0, mask.shape[-1], _expanded(whole, hi - lo).contiguous())]
        pieces.append(_piece(mask, end - at, tile))
    keys = mask.shape[-1]
    del mask
    some, every = torch.stack([p.some for p in pieces]), torch.stack([p.every for p in pieces])
    by_piece, sees, sees_all = every.tolist(), some.any(0).tolist(), every.all(0).tolist()
    out: list[Span] = []
    for i, a in enumerate(range(0, keys, tile)):
        b = min(a + tile, keys)
        if not sees[i]:
            counts["empty"] += 1
        elif sees_all[i]:
            counts["full"] += 1
            if out and out[-1].mask is None and out[-1].stop == a:
                out[-1] = Span(out[-1].start, b)
            else:
                out.append(Span(a, b))
        else:
            counts["mixed"] += 1
            parts = [p.elements(i, e[i], b - a) for p, e in zip(pieces, by_piece, strict=True)]
            found = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
            diagonal = a == lo and _diagonal(found)
            out.append(Span(a, b, diagonal=True) if diagonal else Span(a, b, found))
    return out


def _piece(mask: Tensor, rows: int, tile: int) -> _Piece:
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    plain = mask if mask.dtype == torch.bool else mask == 0
    some = _by_tile(seen.flatten(0, 2).any(0), tile, False).any(1)
    every = _by_tile(plain.flatten(0, 2).all(0), tile, True).all(1)
    mixed = {
        i: _expanded(mask[..., i * tile : (i + 1) * tile], rows).contiguous()
        for i in (some & ~every).nonzero().flatten().tolist()
    }
    return _Piece(some, every, mixed, mask.new_zeros(()), (*mask.shape[:2], rows))


def _by_tile(keys: Tensor, tile: int, value: bool) -> Tensor:
    return nn.functional.pad(keys, (0, -len(keys) % tile), value=value).view(-1, tile)


def _four(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _expanded(mask: Tensor, rows: int) -> Tensor:
    return mask.expand(*mask.shape[:2], rows, mask.shape[-1])


def _lowers_a_row(mask: Tensor) -> bool:
    """Some row has nothing but low numbers (the lowest of its type, instead of minus infinity):
    spans of its keys could not be merged, since its logsumexp has lost their sizes.
    """
    if mask.dtype == torch.bool or not mask.numel():
        return False
    highest = mask.amax(-1)
    return bool(((highest < _LOW) & (highest > -torch.inf)).any())


def _diagonal(mask: Tensor) -> bool:
    """Every row sees exactly the keys up to its own: kernels skip the others."""
    c, s = mask.shape[-2:]
    if c != s:
        return False
    triangle = torch.ones(c, s, dtype=torch.bool, device=mask.device).tril_()
    if mask.dtype == torch.bool:
        return bool((mask == triangle).all())
    return bool(((mask > -torch.inf) == triangle).all() and ((mask == 0) == triangle).all())


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
