"""Attention kernels against the reference and autograd in float64, for every kind of mask."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from close import assert_near, leaf, rand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxmem.kernels import _attention_options, chunk_attention, chunk_attention_backward
from fxmem.kernels._triton import config

SMALL = config(4, 1, M=16, N=16)
KINDS = ("causal", "window", "segments", "valid", "mask")


def masks(kinds: tuple[str, ...], b: int, h: int, c: int, s: int, offset: int) -> dict[str, Any]:
    """Arguments for a combination of mask kinds, drawn so that each hides something."""
    given: dict[str, Any] = {"causal": "causal" in kinds, "offset": offset}
    if "window" in kinds:
        given["window"] = max(1, s // 3)
    if "segments" in kinds:
        given["q_segment"] = torch.randint(2, (b, c), dtype=torch.int32)
        given["k_segment"] = torch.randint(2, (b, s), dtype=torch.int32)
    if "valid" in kinds:
        given["k_valid"] = torch.rand(b, s) > 0.25
    if "mask" in kinds:
        given["mask"] = torch.rand(b, 1, c, s) > 0.25
    return given


def check(
    sizes: tuple[int, ...], dtype: torch.dtype, chosen: Any = SMALL, **given: Any
) -> tuple[Tensor, Tensor]:
    """Forward, backward and accumulation against float64; returns the kernel's ``(out, lse)``."""
    b, groups, n, c, s, e, f = sizes
    h = groups * n
    q, k, v = (
        rand(b, h, c, e, dtype=dtype),
        rand(b, groups, s, e, dtype=dtype),
        rand(b, groups, s, f, dtype=dtype),
    )
    given = {"scale": e**-0.5, **given}
    out, lse = chunk_attention.launcher(q, k, v, config=chosen, **given)
    exact = {**given, "sinks": leaf(given.get("sinks"))}
    q64, k64, v64 = (leaf(x) for x in (q, k, v))
    want, want_lse = chunk_attention.reference(q64, k64, v64, **exact)
    assert_near(out, want, dtype, "out")
    assert_near(lse, want_lse, torch.float32, "lse")
    dout = rand(b, h, c, f, dtype=dtype)
    want.backward(dout.double())
    before_k, before_v = torch.randn(k.shape), torch.randn(v.shape)
    dk, dv = before_k.clone(), before_v.clone()
    dq, dsinks = chunk_attention_backward.launcher(
        dout, q, k, v, out, lse, dk, dv, config=chosen, **given
    )
    assert_near(dq, q64.grad, dtype, "dq")
    assert_near(dk - before_k, k64.grad, dtype, "dk")
    assert_near(dv - before_v, v64.grad, dtype, "dv")
    if dsinks is not None:
        assert_near(dsinks, exact["sinks"].grad, dtype, "dsinks")
    return out, lse


COMBINATIONS = [kinds for r in range(len(KINDS) + 1) for kinds in itertools.combinations(KINDS, r)]


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=lambda kinds: "+".join(kinds) or "none")
def test_every_mask_combination(kinds: tuple[str, ...]) -> None:
    given = masks(kinds, 2, 1, 18, 35, offset=17)
    check((2, 1, 1, 18, 35, 16, 16), torch.float32, **given)


@pytest.mark.parametrize("kinds", ((), ("causal",), KINDS), ids=len)
def test_softcap_and_sinks(kinds: tuple[str, ...]) -> None:
    given = masks(kinds, 1, 2, 18, 35, offset=17)
    for softcap, sinks in ((2.0, None), (0.0, torch.randn(2)), (2.0, torch.randn(2))):
        check((1, 1, 2, 18, 35, 16, 16), torch.float32, softcap=softcap, sinks=sinks, **given)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(
        st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 20),
        st.integers(1, 40), st.sampled_from((3, 16, 20)), st.sampled_from((1, 16, 24)),
    ),
    st.integers(-20, 50),
    st.sets(st.sampled_from(KINDS)),
    st.sampled_from((torch.float32, torch.float16)),
)  # fmt: skip
def test_ragged_sizes(
    sizes: tuple[int, ...], offset: int, kinds: set[str], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    b, g, n, c, s, _, _ = sizes
    check(sizes, dtype, **masks(tuple(kinds), b, g * n, c, s, offset))


@pytest.mark.parametrize(("e", "f"), ((80, 80), (256, 256), (192, 128)))
def test_head_sizes(e: int, f: int) -> None:
    check((1, 1, 2, 17, 33, e, f), torch.float32, offset=16)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(
        st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 20),
        st.integers(1, 40), st.sampled_from((3, 16, 40)), st.sampled_from((1, 33, 48)),
    ),
    st.integers(-20, 50),
    st.sets(st.sampled_from(KINDS)),
    st.sampled_from((0.0, 2.0)),
    st.booleans(),
)  # fmt: skip
def test_wide_heads_by_parts(
    sizes: tuple[int, ...], offset: int, kinds: set[str], softcap: float, sinks: bool
) -> None:
    """The kernels of float32 heads above 128, at sizes that the interpreter can bear."""
    torch.manual_seed(1)
    b, g, n, c, s, _, _ = sizes
    given = masks(tuple(kinds), b, g * n, c, s, offset)
    with mock.patch.multiple(_attention_options, WIDE=0, PART=16):
        given["sinks"] = torch.randn(g * n) if sinks else None
        check(sizes, torch.float32, softcap=softcap, **given)


@pytest.mark.parametrize("chosen", (None, *chunk_attention.CONFIGS), ids=str)
def test_every_configuration(chosen: Any) -> None:
    """Block sizes may differ between queries and keys; the window starts inside a block."""
    check((1, 1, 1, 70, 150, 16, 16), torch.float32, chosen, offset=80, window=40)


def test_additive_mask_per_head_with_hidden_entries() -> None:
    mask = torch.randn(1, 4, 18, 35).masked_fill(torch.rand(1, 4, 18, 35) > 0.7, -torch.inf)
    check((1, 2, 2, 18, 35, 16, 16), torch.float32, mask=mask, offset=17)


def test_rows_that_see_nothing_give_zeros() -> None:
    out, lse = check((1, 2, 1, 20, 20, 16, 16), torch.float32, offset=-5)
    assert not out[:, :, :5].any() and not lse[:, :, :5].any()
    out, lse = check((1, 2, 1, 20, 20, 16, 16), torch.float32, offset=-5, sinks=torch.ones(2))
    assert not out[:, :, :5].any() and bool((lse[:, :, :5] == 1).all())


def test_large_scores_do_not_overflow() -> None:
    q, k = torch.full((1, 1, 4, 16), 30.0), torch.full((1, 1, 40, 16), 30.0)
    v = torch.randn(1, 1, 40, 16)
    out, lse = chunk_attention.launcher(q, k, v, scale=1.0, offset=36, config=SMALL)
    want, want_lse = chunk_attention.reference(
        q.double(), k.double(), v.double(), scale=1.0, offset=36
    )
    assert_near(out, want, torch.float32)
    assert_near(lse, want_lse, torch.float32)


def test_strided_operands_and_prefix_buffers() -> None:
    """A chunk of transposed projections against the start of longer K, V and gradient buffers."""
    q = torch.randn(2, 40, 4, 16).transpose(1, 2)[:, :, 10:27]
    k, v = torch.randn(2, 64, 2, 16).transpose(1, 2), torch.randn(2, 2, 64, 16)
    dk, dv = torch.zeros(2, 2, 64, 16), torch.zeros(2, 2, 64, 16)
    cut = (k[:, :, :27], v[:, :, :27])
    given = {"scale": 0.3, "offset": 10}
    out, lse = chunk_attention.launcher(q, *cut, config=SMALL, **given)
    q64, k64, v64 = (leaf(x) for x in (q, *cut))
    want, _ = chunk_attention.reference(q64, k64, v64, **given)
    assert_near(out, want, torch.float32)
    want.backward(torch.ones_like(want))
    chunk_attention_backward.launcher(
        torch.ones_like(out), q, *cut, out, lse, dk[:, :, :27], dv[:, :, :27], config=SMALL, **given
    )
    assert_near(dk[:, :, :27], k64.grad, torch.float32)
    assert_near(dv[:, :, :27], v64.grad, torch.float32)
    assert not dk[:, :, 27:].any() and not dv[:, :, 27:].any()


def test_chunks_add_up_to_the_whole() -> None:
    """Dout, Q in chunks of 13 against growing prefixes: the sums equal one whole backward."""
    q, k, v = torch.randn(1, 2, 40, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    q64, k64, v64 = (leaf(x) for x in (q, k, v))
    want, _ = chunk_attention.reference(q64, k64, v64, scale=0.25)
    dout = torch.randn(1, 2, 40, 16)
    want.backward(dout.double())
    dk, dv = torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 40, 16)
    for lo in range(0, 40, 13):
        hi = min(lo + 13, 40)
        rows, prefix = slice(lo, hi), slice(0, hi)
        given = {"scale": 0.25, "offset": lo, "config": SMALL}
        args = (q[:, :, rows], k[:, :, prefix], v[:, :, prefix])
        out, lse = chunk_attention.launcher(*args, **given)
        assert_near(out, want[:, :, rows], torch.float32)
        dq, _ = chunk_attention_backward.launcher(
            dout[:, :, rows], *args, out, lse, dk[:, :, prefix], dv[:, :, prefix], **given
        )
        assert_near(dq, q64.grad[:, :, rows], torch.float32)
    assert_near(dk, k64.grad, torch.float32)
    assert_near(dv, v64.grad, torch.float32)


def test_reference_backward_is_autograd() -> None:
    q, k, v, sinks = (leaf(rand(*s)) for s in ((2, 4, 9, 5), (2, 2, 13, 5), (2, 2, 13, 3), (4,)))
    given = {"scale": 0.4, "offset": 4, "window": 6, "softcap": 1.5, "sinks": sinks}
    given["mask"] = torch.randn(1, 4, 9, 13)
    out, lse = chunk_attention.reference(q, k, v, **given)
    dout = torch.randn_like(out)
    out.backward(dout)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    with torch.no_grad():
        dq, dsinks = chunk_attention_backward.reference(dout, q, k, v, out, lse, dk, dv, **given)
    for got, x in ((dq, q), (dk, k), (dv, v), (dsinks, sinks)):
        assert float((got - x.grad).abs().max()) < 1e-12
