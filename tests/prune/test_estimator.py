"""The estimator's facts by enumeration of all masks, to 1e-12."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxmem.prune.search import estimator as est

N = 6
TIGHT = 1e-12


def cube(n: int) -> Tensor:
    return torch.tensor([[bool(i >> j & 1) for j in range(n)] for i in range(2**n)])


MASKS = cube(N)


def probability(masks: Tensor, s: Tensor) -> Tensor:
    return torch.where(masks, s, 1 - s).prod(1)


def setting(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, s0 = (0.1 + 0.8 * torch.rand(N, generator=g, dtype=torch.float64) for _ in range(2))
    return torch.randn(2**N, generator=g, dtype=torch.float64), s, s0


def slope(loss: Tensor, s: Tensor) -> Tensor:
    """The multi-affine oracle: loss with unit i surely kept minus surely gone."""
    out = []
    for i in range(N):
        ends = []
        for value in (1.0, 0.0):
            fixed = s.clone()
            fixed[i] = value
            ends.append(probability(MASKS, fixed) @ loss)
        out.append(ends[0] - ends[1])
    return torch.stack(out)


def expected(loss: Tensor, baseline: Tensor | float, s: Tensor, s0: Tensor, block: Tensor, **kw):
    """Exact mean of the estimate over one mask drawn at s0."""
    p = probability(MASKS, s0)
    base = torch.as_tensor(baseline, dtype=torch.float64).expand(len(p))
    rows = [
        est.gradient(MASKS[k : k + 1], loss[k : k + 1], base[k : k + 1], s, s0, block, **kw)
        for k in range(len(p))
    ]
    return p @ torch.stack(rows)


def close(a: Tensor, b: Tensor, at: float = TIGHT) -> None:
    torch.testing.assert_close(a, b, rtol=at, atol=at)


ONE = torch.zeros(N, dtype=torch.int64)
LAYERS = torch.tensor([0, 0, 3, 3, 3, 7])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("baseline", [0.0, 2.5])
def test_full_ratio_is_unbiased(seed: int, baseline: float) -> None:
    loss, s, s0 = setting(seed)
    close(expected(loss, baseline, s, s0, est.scope_blocks(LAYERS, "full")), slope(loss, s))


def test_own_ratio_is_the_stale_score() -> None:
    loss, s, s0 = setting()
    close(expected(loss, 0.7, s, s0, est.scope_blocks(LAYERS, "none")), slope(loss, s0))
    each = (MASKS.double() - s0) / est.variance(s0)
    now = (MASKS.double() - s) / est.variance(s)
    own = torch.where(MASKS, s / s0, (1 - s) / (1 - s0))
    close(own * now, each)


def test_layer_ratio_is_exact_at_the_hybrid_point() -> None:
    loss, s, s0 = setting()
    found = expected(loss, 1.1, s, s0, est.scope_blocks(LAYERS, "layer"))
    for layer in LAYERS.unique():
        inside = layer == LAYERS
        hybrid = torch.where(inside, s, s0)
        close(found[inside], slope(loss, hybrid)[inside])


def test_second_moment_of_the_ratio() -> None:
    _, s, s0 = setting()
    logs = est.log_ratio(MASKS, s, s0, ONE)[:, 0]
    moment = probability(MASKS, s0) @ torch.exp(2 * logs)
    assert math.isclose(
        float(est.log_second_moment(s, s0, ONE)[0].exp()), float(moment), rel_tol=TIGHT
    )
    assert math.isclose(est.effective_fraction(s, s0, ONE), 1 / float(moment), rel_tol=TIGHT)


def test_slope_is_the_derivative_and_ignores_its_own_probability() -> None:
    loss, s, _ = setting()
    s.requires_grad_(True)
    (grad,) = torch.autograd.grad(probability(MASKS, s) @ loss, s)
    close(grad, slope(loss, s.detach()))
    moved = s.detach().clone()
    moved[2] = 0.9
    close(slope(loss, moved)[2], slope(loss, s.detach())[2])


SMALL = cube(3)


def pairs(s: Tensor, s0: Tensor, loss: Tensor, kind: str) -> Tensor:
    """Mean estimate over all pairs of masks, with a baseline from the other one."""
    p, block = torch.where(SMALL, s0, 1 - s0).prod(1), torch.zeros(3, dtype=torch.int64)
    ratio = est.weights(est.log_ratio(SMALL, s, s0, block), math.inf)[:, 0]
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            pick = torch.tensor([i, j])
            base = est.leave_one_out(loss[pick])
            if kind == "ratio":
                base = base * ratio[pick.flip(0)]
            total += p[i] * p[j] * est.gradient(SMALL[pick], loss[pick], base, s, s0, block)
    return total


@pytest.mark.parametrize("kind", ["plain", "ratio"])
@pytest.mark.parametrize("moved", [False, True])
def test_leave_one_out_is_unbiased(kind: str, moved: bool) -> None:
    torch.manual_seed(3)
    loss = torch.randn(8, dtype=torch.float64)
    s = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)
    s0 = torch.tensor([0.5, 0.4, 0.7], dtype=torch.float64) if moved else s
    x = s.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(torch.where(SMALL, x, 1 - x).prod(1) @ loss, x)
    close(pairs(s, s0, loss, kind), exact)


@pytest.mark.parametrize(("when", "scale"), [("after", 1.0), ("before", 1.8)])
def test_average_baseline_scales_only_if_updated_before_use(when: str, scale: float) -> None:
    """(K - rate) / (K - 1) with the predecessor's sum over K - 1; 1.8 for K = 2, rate 1/5."""
    torch.manual_seed(4)
    loss, past, rate = torch.randn(8, dtype=torch.float64), 0.37, 0.2
    s = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)
    p, block = torch.where(SMALL, s, 1 - s).prod(1), torch.zeros(3, dtype=torch.int64)
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            pick = torch.tensor([i, j])
            base = torch.tensor(past, dtype=torch.float64)
            factor = 1.0
            if when == "before":
                # the predecessor divides the sum by K - 1, the estimate here by K
                base, factor = (1 - rate) * base + rate * loss[pick].mean(), 2.0
            total += p[i] * p[j] * factor * est.gradient(SMALL[pick], loss[pick], base, s, s, block)
    x = s.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(torch.where(SMALL, x, 1 - x).prod(1) @ loss, x)
    close(total, scale * exact)


@pytest.mark.parametrize("p", [1e-4, 0.01, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_variance_of_the_preconditioned_score(p: float, alpha: float) -> None:
    s, block = torch.tensor([p], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    kept, gone = (
        float(est.gradient(torch.tensor([[bit]]), one, zero, s, s, block, alpha=alpha))
        for bit in (True, False)
    )
    # The variance of a two-point variable, without the cancellation of the mean.
    found = p * (1 - p) * (kept - gone) ** 2
    assert math.isclose(found, (p * (1 - p)) ** (2 * alpha - 1), rel_tol=TIGHT)


@pytest.mark.parametrize("clip", [1.2, 2.0])
def test_clip_bias_is_what_it_cuts_off(clip: float) -> None:
    loss, s, s0 = setting(5)
    p = probability(MASKS, s0)
    ratio = est.weights(est.log_ratio(MASKS, s, s0, ONE), math.inf)[:, 0]
    score = (MASKS.double() - s) / est.variance(s)
    above = (ratio - clip).clamp_min(0) - (1 / clip - ratio).clamp_min(0)
    lost = (p * above * (loss - 0.4)) @ score
    close(slope(loss, s) - expected(loss, 0.4, s, s0, ONE, clip=clip), lost)
    largest = float(torch.maximum(ratio, 1 / ratio).max()) * (1 + 1e-9)
    close(expected(loss, 0.4, s, s0, ONE, clip=largest), slope(loss, s))


@pytest.mark.parametrize("scope", ["full", "layer", "none"])
def test_ratio_is_one_at_the_snapshot(scope: str) -> None:
    _, _, s0 = setting()
    logs = est.log_ratio(MASKS, s0, s0, est.scope_blocks(LAYERS, scope))
    assert torch.equal(est.weights(logs, 2.0), torch.ones_like(logs))


def test_monte_carlo_agrees() -> None:
    loss, s, s0 = setting(6)
    s = s0 + 0.3 * (s - s0)
    g = torch.Generator().manual_seed(0)
    draws = torch.rand(20_000, N, generator=g, dtype=torch.float64) < s0
    index = (draws * 2 ** torch.arange(N)).sum(1)
    ratio = est.weights(est.log_ratio(draws, s, s0, ONE), math.inf)
    each = ratio * loss[index, None] * (draws.double() - s) / est.variance(s)
    error = (each.mean(0) - slope(loss, s)).abs()
    assert bool((error <= 4 * each.std(0) / math.sqrt(len(each))).all())
    moment = math.expm1(float(est.log_second_moment(s, s0, ONE)[0]))
    assert abs(float(ratio.var()) / moment - 1) < 0.1


def test_many_units_stay_finite() -> None:
    n = 353_280
    g = torch.Generator().manual_seed(0)
    s0 = torch.full((n,), 0.5, dtype=torch.float64)
    step = 0.01 * (torch.randint(2, (n,), generator=g) * 2 - 1)
    masks = torch.rand(4, n, generator=g) < 0.5
    block = torch.zeros(n, dtype=torch.int64)
    s = s0 + step
    logs = est.log_ratio(masks, s, s0, block)
    assert bool(((logs + 70).abs() < 4 * 12).all())
    # All steps of one sign: the two extreme masks are where exp overflows, clipped in log space.
    extreme = torch.stack([torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)])
    ends = est.log_ratio(extreme, s0 + 0.01, s0, block)[:, 0]
    expected = torch.tensor([math.log(1.02), math.log(0.98)], dtype=torch.float64) * n
    torch.testing.assert_close(ends, expected, rtol=1e-10, atol=0)
    assert 6.9e3 < float(ends[0]) < 7.2e3
    assert -7.2e3 < float(ends[1]) < -6.9e3
    pair = torch.tensor([1.0, 2.0], dtype=torch.float64)
    steep = est.gradient(
        extreme, pair, est.leave_one_out(pair), s0 + 0.01, s0, block, clip=2.0, alpha=0.5
    )
    assert bool(torch.isfinite(steep).all())
    ordinary = est.log_ratio(masks, s0 + 0.01, s0, block)
    assert bool(((ordinary + 70).abs() < 4 * 12).all())
    losses = torch.randn(4, generator=g, dtype=torch.float64)
    found = est.gradient(masks, losses, est.leave_one_out(losses), s, s0, block, clip=2.0)
    assert bool(torch.isfinite(found).all())
    single = est.log_ratio(masks, s.float(), s0.float(), block)
    print("float32 gap of the log ratio:", float((single - logs).abs().max()))


@pytest.mark.parametrize("seed", range(5))
def test_trust_keeps_the_second_moment_below_its_cap(seed: int) -> None:
    loss, target, s0 = setting(seed)
    block, cap = est.scope_blocks(LAYERS, "layer"), 0.2
    one = s0 + est.trust(target - s0, s0, block, cap) * (target - s0)
    assert float(est.log_second_moment(one, s0, block).max()) <= cap


def test_weight_gradients_are_unbiased_and_stay_off_removed_entries() -> None:
    """The mean of ratio x gradient over masks of s0 is the gradient of the expected loss at s."""
    torch.manual_seed(0)
    first, second = torch.randn(N, 3, dtype=torch.float64), torch.randn(2, N, dtype=torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    _, s, s0 = setting()

    def grads(mask: Tensor) -> tuple[Tensor, Tensor]:
        a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
        out = (torch.tanh(x @ a.T) * mask.double()) @ b.T
        got = torch.autograd.grad(((out - y) ** 2).mean(), (a, b))
        assert bool((got[0][~mask] == 0).all()) and bool((got[1][:, ~mask] == 0).all())
        return got[0], got[1]

    each = [grads(mask) for mask in MASKS]
    ratio = est.weights(est.log_ratio(MASKS, s, s0, ONE), math.inf)[:, 0]
    p0, p = probability(MASKS, s0), probability(MASKS, s)
    for part in (0, 1):
        stack = torch.stack([g[part] for g in each])
        close(torch.einsum("k,kij->ij", p0 * ratio, stack), torch.einsum("k,kij->ij", p, stack))
