"""Masks as spans: they say what the mask says, however few rows are evaluated at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxmem.runtime import tile_map
from fxmem.runtime.loops import chunks


def _mask(kind: str, rows: int, keys: int, heads: int, *, additive: bool) -> Tensor:
    at, key = torch.arange(rows)[:, None], torch.arange(keys)
    seen = {
        "causal": key <= at, "window": (key <= at) & (key > at - 5), "all": key >= 0 * at,
        "none": key < 0 * at, "documents": key // 7 == at // 7,
        "random": torch.rand(rows, keys) < 0.8, "padding": (key < keys - 3)[None],
    }[kind].expand(1, heads, -1, keys)  # fmt: skip
    return torch.where(seen, 0.0, -torch.inf) if additive else seen


def _whole(spans: tuple[tile_map.Span, ...], lo: int, hi: int, mask: Tensor) -> Tensor:
    hidden = False if mask.dtype == torch.bool else -torch.inf
    found = torch.full((*mask.shape[:2], hi - lo, mask.shape[-1]), hidden, dtype=mask.dtype)
    for s in spans:
        own = found[..., s.start : s.stop]
        if s.mask is not None:
            own.copy_(s.mask)
        else:
            every = torch.ones(own.shape, dtype=torch.bool)
            every = every.tril() if s.diagonal else every
            own.copy_(every if mask.dtype == torch.bool else torch.where(every, 0.0, -torch.inf))
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["causal", "window", "all", "none", "documents", "random", "padding"]),
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 2), st.integers(1, 12),
    st.integers(1, 200), st.booleans(),
)  # fmt: skip
def test_spans_say_what_the_mask_says(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, keys: int, heads: int, chunk: int,
    piece: int, additive: bool,
) -> None:  # fmt: skip
    mask = _mask(kind, rows, keys, heads, additive=additive)
    at_once: list[int] = []

    def some(lo: int, hi: int) -> Tensor:
        found = mask if mask.shape[-2] == 1 else mask[..., lo:hi, :]
        at_once.append(found.numel())
        return found

    parts = chunks(rows, chunk)
    plain = tile_map.build(some, parts)
    at_once.clear()
    monkeypatch.setattr(tile_map, "PIECE", piece)
    found = tile_map.build(some, parts)
    assert max(at_once) <= max(piece, heads * keys)
    for (lo, hi), spans, others in zip(parts, found.spans, plain.spans, strict=True):
        want = (mask if mask.shape[-2] == 1 else mask[..., lo:hi, :]).expand(-1, -1, hi - lo, -1)
        torch.testing.assert_close(_whole(spans, lo, hi, mask), want, rtol=0, atol=0)
        assert [(s.start, s.stop, s.diagonal) for s in spans] == [
            (s.start, s.stop, s.diagonal) for s in others
        ]
    assert (found.causal, found.full, found.mixed, found.empty) == (
        plain.causal, plain.full, plain.mixed, plain.empty
    )  # fmt: skip


def test_a_row_of_low_numbers_keeps_its_chunk_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 5, :] = torch.finfo(torch.float32).min
    monkeypatch.setattr(tile_map, "PIECE", 8)
    found = tile_map.build(lambda lo, hi: mask[..., lo:hi, :], chunks(8, 4))
    assert found.spans[0] == (tile_map.Span(0, 8),)
    (low,) = found.spans[1]
    assert low.mask is not None and torch.equal(low.mask, mask[..., 4:, :])
