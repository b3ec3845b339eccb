"""Chunk functions of the kernels against plain autograd: attention, token losses, dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from fxmem.kernels import attention, dropout, token_nll
from fxmem.kernels.attention import Span, causal_spans, explicit_spans, full_spans

T = 11
CHUNKS = (1, 2, 4, 7, 10, 11, 50)
# (query heads, key heads, head size, value size)
HEADS = {
    "plain": (3, 3, 4, 4),
    "grouped": (6, 2, 4, 4),
    "one group": (4, 1, 4, 4),
    "values": (4, 2, 4, 7),
}
SpansOf = Callable[[int, int, Tensor], Sequence[Span]]


def inputs(heads: str, dtype: torch.dtype = torch.float64, s: int = T) -> list[Tensor]:
    h, g, e, f = HEADS[heads]
    q, k, v = torch.randn(2, h, T, e), torch.randn(2, g, s, e), torch.randn(2, g, s, f)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def reference(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Written out, so that rows without a visible key give zeros as the kernels define it."""
    n = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(n, 1).transpose(-1, -2) * 0.37
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e300) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1)
    if mask is not None and mask.dtype == torch.bool:
        p = p * mask.any(-1, keepdim=True)
    out = p @ v.repeat_interleave(n, 1)
    return out.detach(), list(torch.autograd.grad(out, (q, k, v), dout))


def chunked(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spans: SpansOf, chunk: int
) -> tuple[Tensor, list[Tensor]]:
    q, k, v = q.detach(), k.detach(), v.detach()
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    outs, dqs = [], []
    for lo in range(0, q.shape[2], chunk):
        hi = min(lo + chunk, q.shape[2])
        rows, at = q[:, :, lo:hi], spans(lo, hi, k)
        out, lse = attention.forward(rows, k, v, at, 0.37)
        outs.append(out)
        d = dout[:, :, lo:hi]
        dqs.append(attention.backward(d, rows, k, v, out, lse, dk, dv, at, 0.37))
    return torch.cat(outs, 2), [torch.cat(dqs, 2), dk, dv]


def check(
    got: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]], tol: float = 1e-12
) -> None:
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b).abs().max() <= tol * b.abs().max().clamp(min=1e-30), (
            (a - b).abs().max()
        )


def tril(s: int = T) -> Tensor:
    return torch.ones(T, s, dtype=torch.bool).tril()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("heads", HEADS)
def test_causal_chunks(heads: str, chunk: int) -> None:
    q, k, v = inputs(heads)
    dout = torch.randn(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    got = chunked(q, k, v, dout, lambda lo, hi, _: causal_spans(lo, hi), chunk)
    check(got, reference(q, k, v, dout, tril()))


@pytest.mark.parametrize("chunk", (1, 4, 11))
@pytest.mark.parametrize("heads", HEADS)
def test_full_chunks_with_another_number_of_keys(heads: str, chunk: int) -> None:
    q, k, v = inputs(heads, s=6)
    dout = torch.randn(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    got = chunked(q, k, v, dout, lambda lo, hi, k: full_spans(k), chunk)
    check(got, reference(q, k, v, dout, None))


@pytest.mark.parametrize("kind", ("shared", "per head", "batch", "additive"))
@pytest.mark.parametrize("heads", HEADS)
def test_mask_spans_with_rows_that_see_nothing(heads: str, kind: str) -> None:
    q, k, v = inputs(heads)
    shape = (2 if kind == "batch" else 1, q.shape[1] if kind == "per head" else 1, T, T)
    mask = torch.rand(shape) > 0.4
    if kind == "additive":
        mask = torch.randn(shape, dtype=torch.float64)
    else:
        mask[:, :, 0] = False
        mask[:, :, 5, 3:] = False
        mask[:, :, 5, :3] = False
    dout = torch.randn(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    want = reference(q, k, v, dout, mask)
    if kind != "additive":
        assert not want[0][:, :, 0].any()
    for chunk in (1, 3, 11):
        got = chunked(q, k, v, dout, lambda lo, hi, _: explicit_spans(mask[:, :, lo:hi]), chunk)
        check(got, want)


@pytest.mark.parametrize("heads", HEADS)
def test_several_spans_merge(heads: str) -> None:
    """A row may see nothing in one span and something in another."""
    q, k, v = inputs(heads)
    mask = torch.zeros(T, T, dtype=torch.bool)
    mask[:, 2:5] = True
    mask[:, 8:] = torch.rand(T, 3) > 0.5
    mask[4] = False
    mask[4, 8] = True
    mask[6, 2:5], mask[6, 8:] = True, False
    first, second = mask[None, None, :, 2:5], mask[None, None, :, 8:]

    def spans(lo: int, hi: int, _: Tensor) -> Sequence[Span]:
        return Span(2, 5, first[:, :, lo:hi]), Span(8, 11, second[:, :, lo:hi])

    dout = torch.randn(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for chunk in (1, 4, 11):
        check(chunked(q, k, v, dout, spans, chunk), reference(q, k, v, dout, mask))


def test_no_span_gives_zeros() -> None:
    q, k, v = (x.detach() for x in inputs("grouped"))
    out, lse = attention.forward(q, k, v, (), 0.37)
    assert out.shape == q.shape and not out.any() and not lse.any()
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    assert not attention.backward(out, q, k, v, out, lse, dk, dv, (), 0.37).any()
    assert not dk.any() and not dv.any()


@pytest.mark.parametrize("heads", HEADS)
def test_bfloat16_is_as_near_as_torch(heads: str) -> None:
    q, k, v = inputs(heads, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(*q.shape[:3], v.shape[-1]).bfloat16()
    want = reference(wide[0], wide[1], wide[2], dout.double(), tril())
    got = chunked(q, k, v, dout, lambda lo, hi, _: causal_spans(lo, hi), 4)
    assert all(x.dtype == torch.bfloat16 for x in (got[0], *got[1]))
    check(got, want, tol=0.03)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", (False, True))
def test_op_and_its_gradient(heads: str, causal: bool) -> None:
    q, k, v = inputs(heads)
    dout = torch.randn(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    out, _ = attention.attention(q, k, v, None, causal, 0.37)
    got = out.detach(), list(torch.autograd.grad(out, (q, k, v), dout))
    plain = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.37, enable_gqa=True)
    check(got, (plain.detach(), list(torch.autograd.grad(plain, (q, k, v), dout))))


@pytest.mark.parametrize("tile", (1, 12, 1 << 20))
@pytest.mark.parametrize("ignored", ("none", "some", "all"))
def test_token_nll(ignored: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_nll, "TILE", tile)
    logits = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(6, (9,))
    target[: {"none": 0, "some": 4, "all": 9}[ignored]] = -100
    weight = torch.randn(9, dtype=torch.float64)
    plain = cross_entropy(logits, target, reduction="none")
    (want,) = torch.autograd.grad(plain, logits, weight)
    nll, lse = token_nll.token_nll(logits, target, -100)
    assert torch.allclose(nll, plain, rtol=1e-13, atol=1e-13)
    (got,) = torch.autograd.grad(nll, logits, weight)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        own = logits.clone()
        result = token_nll.backward(weight, own, target, lse.detach(), -100, out=own)
    assert result is own and torch.equal(own, got)
    with torch.no_grad():
        own = logits.clone()
        nll, sums = token_nll.forward_(own, target, -100)
        assert torch.allclose(nll, plain, rtol=1e-13, atol=1e-13)
        result = token_nll.backward_(weight, own, target, sums, -100)
    assert result is own and torch.allclose(own, want, rtol=1e-12, atol=1e-14)


def test_token_nll_mean_over_no_token_has_no_nan_gradient() -> None:
    logits, target = torch.randn(3, 4), torch.full((3,), -100)
    grad = token_nll.backward(
        torch.full((3,), torch.inf), logits, target, logits.logsumexp(-1), -100
    )
    assert not grad.any()


@pytest.mark.parametrize("chunk", (1, 3, 5, 7, 9))
@pytest.mark.parametrize(
    ("dim", "outer", "inner"), ((1, 1, 1), (0, 1, 1), (1, 2, 1), (1, 1, 3), (1, 2, 3))
)
def test_dropout_chunks_equal_the_whole(chunk: int, dim: int, outer: int, inner: int) -> None:
    length, seed = 7, torch.tensor(1234567)
    shape = [2, 3, 4]
    shape[dim] = outer * length * inner
    x = torch.randn(shape, dtype=torch.float64)
    whole = dropout.dropout(x, seed, 0.4, 3, [])
    split = x.unflatten(dim, (outer, length, inner))
    parts = []
    for lo in range(0, length, chunk):
        rows = split.narrow(dim + 1, lo, min(chunk, length - lo)).flatten(dim, dim + 2)
        part = dropout.dropout(rows, seed, 0.4, 3, [dim, outer, inner, lo, length])
        parts.append(part.unflatten(dim, (outer, -1, inner)))
    assert torch.equal(torch.cat(parts, dim + 1).flatten(dim, dim + 2), whole)


@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 1.0))
def test_dropout_keep_rate_and_scale(p: float) -> None:
    x = torch.ones(300, 300, dtype=torch.float64)
    out = dropout.dropout(x, torch.tensor(5), p, 0, [])
    kept = (out != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p)) ** 0.5 / 300 + 1e-12
    assert torch.allclose(out[out != 0], x[out != 0] / (1 - p if p < 1 else 1))
    rows = (out != 0).double().mean(1)
    assert (rows - (1 - p)).abs().max() < 6 * (p * (1 - p) / 300) ** 0.5 + 1e-12


def test_dropout_masks_differ_by_seed_and_site() -> None:
    x = torch.ones(100, 100, dtype=torch.float64)
    masks = [dropout.dropout(x, torch.tensor(s), 0.5, n, []) != 0 for s in (1, 2) for n in (0, 1)]
    for a in range(4):
        for b in range(a):
            assert abs((masks[a] == masks[b]).double().mean().item() - 0.5) < 0.03


def test_dropout_backward_uses_the_same_mask() -> None:
    x = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    out = dropout.dropout(x, torch.tensor(9), 0.3, 2, [])
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad != 0, out != 0)
    assert torch.allclose(grad[grad != 0], torch.tensor(1 / 0.7, dtype=torch.float64))
