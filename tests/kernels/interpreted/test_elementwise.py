"""Norms, gated activations, rotary embedding: kernels against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_near, leaf, rand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxmem.kernels import gated, norm, rotary
from fxmem.kernels._triton import config

DTYPES = st.sampled_from((torch.float32, torch.float16))
SLOW = {"suppress_health_check": [HealthCheck.too_slow]}


def check_norm(r: int, d: int, dtype: torch.dtype, center: bool, offset: float) -> None:
    x = rand(r, d + 3, dtype=dtype)[:, 1 : d + 1]
    weight, bias = rand(d, dtype=dtype), rand(d, dtype=dtype) if center else None
    x64, w64, b64 = (leaf(t) for t in (x, weight, bias))
    if center:
        want = F.layer_norm(x64, (d,), w64 + offset, b64, 1e-5)
    else:
        want = F.rms_norm(x64, (d,), w64 + offset, 1e-5)
    y, rstd, mean = norm.launcher(x, weight, bias, eps=1e-5, center=center, offset=offset)
    assert_near(y, want, dtype, "y")
    dy = rand(r, d, dtype=dtype)
    want.backward(dy.double())
    for run in (norm.launcher_backward, norm.reference_backward):
        dw, db = torch.ones(d), torch.ones(d) if center else None
        dx = run(dy, x, rstd, mean, weight, offset=offset, dweight=dw, dbias=db)
        assert_near(dx, x64.grad, dtype, "dx")
        assert_near(dw - 1, w64.grad, dtype, "dw")
        if db is not None:
            assert_near(db - 1, b64.grad, dtype, "db")


@settings(max_examples=10, **SLOW)
@given(
    st.tuples(st.integers(1, 9), st.integers(2, 70), DTYPES, st.booleans(),
              st.sampled_from((0.0, 1.0)))
)  # fmt: skip
def test_norm(drawn: Any) -> None:
    torch.manual_seed(3)
    check_norm(*drawn)


def test_norm_of_wide_rows_sums_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "FUSED", 64)
    monkeypatch.setattr(norm, "COLUMNS", config(4, 1, R=16, C=32))
    for center in (False, True):
        check_norm(20, 90, torch.float32, center, 0.0)


def test_norm_without_weight_and_rows_too_wide() -> None:
    x = torch.randn(3, 10)
    y, _, _ = norm.launcher(x, eps=1e-6)
    assert_near(y, F.rms_norm(x.double(), (10,), eps=1e-6), torch.float32)
    with pytest.raises(ValueError, match="at most"):
        norm.launcher(torch.empty(1, norm.LARGEST + 1, device="meta"), eps=1e-6)


def activate(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


@settings(max_examples=9, **SLOW)
@given(st.sampled_from(gated.ACTIVATIONS), st.integers(1, 5), st.integers(1, 70), DTYPES)
def test_gated(act: str, n: int, i: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    both = rand(n, 2 * i, dtype=dtype) * 3
    gate, up = both[:, :i], both[:, i:]
    small = config(4, 1, I=16)
    g64, u64 = leaf(gate), leaf(up)
    want = activate(g64, act) * u64
    assert_near(gated.launcher(gate, up, act=act, config=small), want, dtype, "out")
    dout = rand(n, i, dtype=dtype)
    want.backward(dout.double())
    for run in (gated.launcher_backward, gated.reference_backward):
        dgate, dup, out = run(dout, gate, up, act=act, again=True, config=small)
        assert_near(dgate, g64.grad, dtype, "dgate")
        assert_near(dup, u64.grad, dtype, "dup")
        assert_near(out, want, dtype, "out")


@pytest.mark.parametrize("act", gated.ACTIVATIONS)
def test_gated_far_from_zero(act: str) -> None:
    gate = torch.tensor([[-200.0, -30.0, -1e-3, 0.0, 1e-3, 30.0, 200.0]])
    g64 = leaf(gate)
    activate(g64, act).sum().backward()
    ones = torch.ones_like(gate)
    dgate, _, out = gated.launcher_backward(ones, gate, ones, act=act, again=True)
    assert_near(dgate, g64.grad, torch.float32)
    assert_near(out / 200, activate(gate.double(), act) / 200, torch.float32)
    assert gated.launcher_backward(ones, gate, ones, act=act)[2] is None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As models write it."""
    r = cos.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    if interleaved:
        other = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        other = torch.cat([-turned[..., r // 2 :], turned[..., : r // 2]], -1)
    return torch.cat([turned * cos[:, None] + other * sin[:, None], rest], -1)


@settings(max_examples=10, **SLOW)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 6), st.integers(0, 5),
    st.booleans(), st.booleans(), DTYPES,
)  # fmt: skip
def test_rotary(
    b: int,
    h: int,
    t: int,
    half: int,
    rest: int,
    interleaved: bool,
    shared: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(5)
    r = 2 * half
    x = rand(b, t, h, r + rest, dtype=dtype).transpose(1, 2)
    cos, sin = (rand(1 if shared else b, t, r, dtype=dtype) for _ in range(2))
    x64 = leaf(x)
    want = rotate(x64, cos.double(), sin.double(), interleaved)
    dy = rand(b, h, t, r + rest, dtype=dtype)
    want.backward(dy.double())
    for run in (rotary.launcher, rotary.reference):
        given = {"interleaved": interleaved, "config": config(4, 1, T=16)}
        assert_near(run(x, cos, sin, **given), want, dtype, "y")
        assert_near(run(dy, cos, sin, transpose=True, **given), x64.grad, dtype, "dx")
