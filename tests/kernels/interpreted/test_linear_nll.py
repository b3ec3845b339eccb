"""LM head and token scores without logits: kernels and references against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_near, leaf, rand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxmem.kernels import linear_nll, linear_nll_backward
from fxmem.kernels._triton import config

SMALL = config(4, 1, N=16, V=16, D=16)


def plain(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float, tau: float
) -> linear_nll.Scores:
    """The definition, with whole logits."""
    z = F.linear(h, weight, bias)
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / tau
    log_p = z.log_softmax(1)
    ignored = target == -100
    dead = ignored.all(1)
    scores = (-(log_p.exp() * log_p).sum(1), z.logsumexp(1), z.mean(1))
    logp = log_p.gather(1, target.clamp(min=0)).masked_fill(ignored, 0)
    return logp, *(x.masked_fill(dead, 0) for x in scores)  # type: ignore[return-value]


def check(
    n: int, d: int, v: int, k: int, dtype: torch.dtype, bias: bool, softcap: float, tau: float,
    chosen: Any = SMALL, reference: bool = False,
) -> None:  # fmt: skip
    h, weight = rand(n, d, dtype=dtype) / d**0.25, rand(v, d, dtype=dtype) / d**0.25
    b = rand(v, dtype=dtype) if bias else None
    target = torch.randint(v, (n, k))
    target[torch.rand(n, k) < 0.3] = -100
    wide = [leaf(x) for x in (h, weight, b)]
    want = plain(*wide, target, softcap, tau)
    grads = [torch.randn_like(x) for x in want]
    torch.autograd.backward(list(want), grads)
    given: dict[str, Any] = {"softcap": softcap, "temperature": tau}
    run, run_backward = linear_nll.launcher, linear_nll_backward.launcher
    args: list[Tensor | None] = [h, weight, b]
    if reference:
        run, run_backward = linear_nll.reference, linear_nll_backward.reference
        args = [None if x is None else x.detach() for x in wide]
    else:
        given["config"] = chosen
    got = run(*args, target, **given)
    for name, a, x in zip(("logp", "entropy", "lse", "mean"), got, want, strict=True):
        assert_near(a, x, torch.float64 if reference else torch.float32, name)
    wide_type = torch.float64 if reference else torch.float32
    dw = torch.ones(v, d, dtype=wide_type)
    db = torch.ones(v, dtype=wide_type) if bias else None
    dh = run_backward(*args, target, got[1], got[2], *grads, dweight=dw, dbias=db, **given)
    assert_near(dh, wide[0].grad, dtype, "dh")
    assert_near(dw - 1, wide[1].grad, dtype, "dw")
    if db is not None:
        assert_near(db - 1, wide[2].grad, dtype, "db")


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(
        st.integers(1, 35), st.integers(1, 40), st.integers(1, 70), st.integers(1, 3),
        st.sampled_from((torch.float32, torch.float16)), st.booleans(),
        st.sampled_from((0.0, 3.0)), st.sampled_from((1.0, 0.7)),
    )
)  # fmt: skip
def test_ragged_sizes(drawn: Any) -> None:
    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_nll_backward, "WIDTH", 32)
        check(*drawn)


@pytest.mark.parametrize("chosen", linear_nll.CONFIGS, ids=str)
def test_every_configuration(chosen: Any) -> None:
    check(70, 70, 300, 1, torch.float32, True, 3.0, 1.0, chosen)


def test_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_nll, "TILE", 16)
    monkeypatch.setattr(linear_nll_backward, "TILE", 16)
    for bias, softcap, tau in ((False, 0.0, 1.0), (True, 3.0, 0.7)):
        check(20, 11, 37, 3, torch.float64, bias, softcap, tau, reference=True)


def test_every_token_ignored_gives_zeros_even_with_infinite_gradients() -> None:
    h, weight, target = torch.randn(5, 8), torch.randn(20, 8), torch.full((5, 1), -100)
    got = linear_nll.launcher(h, weight, None, target, config=SMALL)
    assert not any(x.any() for x in got)
    dw, grad = torch.zeros(20, 8), torch.full((5, 1), torch.inf)
    dh = linear_nll_backward.launcher(
        h, weight, None, target, got[1], got[2], grad, dweight=dw, config=SMALL
    )
    assert not dh.any() and not dw.any()


def test_large_logits_do_not_overflow() -> None:
    h, weight = torch.full((3, 4), 100.0), torch.randn(50, 4) * 100
    target = torch.tensor([[1], [2], [49]])
    got = linear_nll.launcher(h, weight, None, target, config=SMALL)
    want = plain(h.double(), weight.double(), None, target, 0.0, 1.0)
    for a, x in zip(got, want, strict=True):
        assert_near(a, x, torch.float32)


def test_splits_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_nll, "processors", lambda _: 64)
    check(9, 16, 150, 2, torch.float32, True, 0.0, 1.0)


def test_deterministic_mode_takes_one_part() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        check(20, 16, 70, 1, torch.float32, False, 0.0, 1.0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_token_loss_is_torchs_cross_entropy(smoothing: float) -> None:
    h, weight = torch.randn(9, 8), torch.randn(30, 8)
    target = torch.randint(30, (9, 1))
    logp, _, lse, mean = linear_nll.launcher(h, weight, None, target, config=SMALL)
    got = linear_nll.token_loss(logp, lse, mean, smoothing, z_loss=0.01)
    z = (h @ weight.t()).double()
    want = F.cross_entropy(z, target[:, 0], reduction="none", label_smoothing=smoothing)
    assert_near(got, want + 0.01 * z.logsumexp(1) ** 2, torch.float32)


def test_memory_of_the_scores_does_not_grow_with_the_vocabulary() -> None:
    from fxmem.kernels._triton import recording

    sizes = []
    for v in (10_000, 1_000_000):
        new = {"device": "meta"}
        h, weight = torch.empty(256, 64, **new), torch.empty(v, 64, **new)
        target = torch.empty(256, 1, dtype=torch.int64, **new)
        with recording() as launches:
            linear_nll.launcher(h, weight, None, target)
        args = launches[0].args
        sizes.append(sum(args[x].numel() for x in ("TOP", "SUM", "WEIGHTED", "TOTAL", "PICKED")))
    assert sizes[1] <= sizes[0] * 1.1 and sizes[1] <= 256 * 5 * linear_nll.SPLITS
