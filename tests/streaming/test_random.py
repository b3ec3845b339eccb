"""Random operators: replayed exactly whatever the chunks, right in distribution, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import in_parts
from noises import NOISES, D, Noise
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream, UnsupportedOpError
from fxmem._compat import graph as _compat
from fxmem.frontend.stateless_random import FORMS, StatelessRandom

VOCAB, LENGTH = 11, 13


GROUPS = [list(NOISES)[i::4] for i in range(4)]

_source = torch.Generator().manual_seed(0)


def _weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_source, dtype=torch.float64) * 0.5


TABLE, MIX, UP, HEAD = _weight(VOCAB, D), _weight(D, D), _weight(D, D), _weight(D, VOCAB)
IDS = torch.randint(VOCAB, (2, LENGTH), generator=_source)


def program(names: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention, then every noise; the loss is a function of ``v [D]``, a scale."""

    def fn(ids: Tensor, v: Tensor) -> Tensor:
        x = F.embedding(ids, TABLE) * v
        q = (F.layer_norm(x, (D,)) @ MIX)[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]
        for name in names:
            x = x + 0.5 * torch.tanh(NOISES[name](F.layer_norm(x, (D,)) @ UP))
        return F.cross_entropy((x @ HEAD).flatten(0, 1), ids.flatten())

    return fn


def streamed(fn: Any, chunk: int) -> Any:
    torch.compiler.reset()
    plan = Plan(stream=Stream(chunk=chunk, loss_chunk=chunk))
    return torch.compile(fn, backend=fxmem.backend(plan), fullgraph=True)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss_and_slope(step: Any) -> tuple[Tensor, Tensor]:
    v = nn.Parameter(torch.ones(D))
    torch.manual_seed(3)
    loss = step(IDS, v)
    loss.backward()
    assert v.grad is not None
    return loss.detach(), v.grad


def check(names: list[str], chunks: tuple[int, ...] = (1, LENGTH)) -> None:
    """The gradient is that of the loss at the same seed; chunks change neither."""
    step = streamed(program(names), 4)
    loss, slope = loss_and_slope(step)
    direction = torch.linspace(-1, 1, D)

    def at(t: float) -> float:
        torch.manual_seed(3)
        return float(step(IDS, nn.Parameter(1 + t * direction)).detach())

    difference = (at(1e-6) - at(-1e-6)) / 2e-6
    assert float(slope @ direction) == pytest.approx(difference, rel=1e-5, abs=1e-6), names
    torch.manual_seed(4)
    assert float(step(IDS, nn.Parameter(torch.ones(D))).detach()) != float(loss)
    for chunk in chunks:
        again = loss_and_slope(streamed(program(names), chunk))
        assert largest_difference(dict(enumerate(again)), dict(enumerate((loss, slope))))[0] < 1e-10


@pytest.mark.parametrize("at", in_parts(GROUPS))
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_gradient_is_that_of_the_numbers_drawn(at: int) -> None:
    check(GROUPS[at], ((1,), (LENGTH,), (), ())[at])


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(NOISES)), min_size=1, max_size=4))
def test_many_noises(names: list[str]) -> None:
    check(names)


@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_a_backward_after_another_forward_draws_its_own_numbers() -> None:
    step = streamed(program(["randn_like", "gumbel_softmax", "dropout1d"]), 3)
    _, want = loss_and_slope(step)
    v = nn.Parameter(torch.ones(D))
    torch.manual_seed(3)
    loss = step(IDS, v)
    step(IDS, v)
    with torch.no_grad():
        step(IDS, v)
    (got,) = torch.autograd.grad(loss, v)
    assert torch.equal(got, want)


WIDE = 600
"""Elements per token that are too many to stand whole."""


def test_wide_numbers_drawn_without_a_parameter_are_the_same_everywhere() -> None:
    """They are drawn again in every chunk of every region that reads them."""
    up, down = _weight(D, WIDE), _weight(WIDE, D)

    def fn(ids: Tensor, v: Tensor) -> Tensor:
        x = F.embedding(ids, TABLE) * v
        noise = torch.rand(*ids.shape, WIDE) - 0.5
        rows = torch.rand(ids.shape[1], 1) < 0.7
        at = torch.arange(ids.shape[1])
        seen = rows | (at == at.unsqueeze(-1))
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], seen)[:, 0]
            x = x + ((x @ up).tanh() * noise) @ down
        return F.cross_entropy((x @ HEAD).flatten(0, 1), ids.flatten()) + 0 * noise.sum()

    step = streamed(fn, 4)
    loss, slope = loss_and_slope(step)
    direction = torch.linspace(-1, 1, D)

    def at(t: float) -> float:
        torch.manual_seed(3)
        return float(step(IDS, nn.Parameter(1 + t * direction)).detach())

    difference = (at(1e-6) - at(-1e-6)) / 2e-6
    assert float(slope @ direction) == pytest.approx(difference, rel=1e-5)
    assert loss_and_slope(streamed(fn, 5))[0] == pytest.approx(float(loss), rel=1e-12)


def test_narrow_numbers_drawn_without_a_parameter_are_those_of_torch() -> None:
    def fn(ids: Tensor, v: Tensor) -> Tensor:
        x = F.embedding(ids, TABLE) * (v + torch.randn(*ids.shape, D))
        return F.cross_entropy((x @ HEAD).flatten(0, 1), ids.flatten())

    plain, got = loss_and_slope(fn), loss_and_slope(streamed(fn, 4))
    assert largest_difference(dict(enumerate(got)), dict(enumerate(plain)))[0] < 1e-10


COUNT = 40_000
ROWS = torch.linspace(0.1, 0.9, COUNT)
DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(COUNT),
    "rand_half": lambda: torch.rand(COUNT, dtype=torch.bfloat16),
    "rand_like": lambda: torch.rand_like(ROWS, dtype=torch.float32),
    "randn": lambda: torch.randn(COUNT, dtype=torch.float32),
    "randn_like": lambda: torch.randn_like(ROWS),
    "randn_half": lambda: torch.randn(COUNT, dtype=torch.float16),
    "randint": lambda: torch.randint(-3, 9, (COUNT,)),
    "randint_large": lambda: torch.randint(2**62, (COUNT,)),
    "randint_like": lambda: torch.randint_like(ROWS, 2, 5),
    "randint_like_tensor": lambda: torch.randint_like(ROWS, torch.tensor(7.0)),
    "randperm": lambda: torch.randperm(COUNT),
    "bernoulli": lambda: torch.bernoulli(ROWS),
    "bernoulli_p": lambda: ROWS.bernoulli(0.3),
    "bernoulli_": lambda: torch.empty(COUNT, dtype=torch.bool).bernoulli_(0.2),
    "bernoulli_default": lambda: torch.empty(COUNT).bernoulli_(),
    "uniform_": lambda: torch.empty(COUNT).uniform_(-2, 3),
    "normal_": lambda: torch.empty(COUNT).normal_(1, 2),
    "normal": lambda: torch.normal(ROWS, 2 * ROWS),
    "normal_broadcast": lambda: torch.normal(ROWS[:200], ROWS[:200].unsqueeze(1)),
    "normal_std": lambda: torch.normal(0.5, ROWS),
    "normal_size": lambda: torch.normal(0.5, 2.0, (COUNT,)),
    "exponential_": lambda: torch.empty(COUNT).exponential_(3),
    "log_normal_": lambda: torch.empty(COUNT).log_normal_(0.1, 0.4),
    "cauchy_": lambda: torch.empty(COUNT).cauchy_(1, 2),
    "geometric_": lambda: torch.empty(COUNT).geometric_(0.3),
    "random_": lambda: torch.empty(COUNT).random_(),
    "random_integers": lambda: torch.empty(COUNT, dtype=torch.int16).random_(),
    "random_below": lambda: torch.empty(COUNT).random_(20),
    "random_between": lambda: torch.empty(COUNT).random_(-5, 5),
    "multinomial": lambda: torch.multinomial(torch.tensor([0.1, 0, 2, 1]).expand(COUNT, 4), 2),
    "multinomial_replaced": lambda: torch.multinomial(torch.tensor([0.1, 0, 2, 0]), COUNT, True),
    "native_dropout": lambda: torch.native_dropout(ROWS, 0.3, True)[0],
    "dropout_of_all": lambda: torch.native_dropout(ROWS, 1.0, True)[0],
    "rrelu": lambda: F.rrelu(ROWS - 0.5, training=True),
    "alpha_dropout": lambda: F.alpha_dropout(ROWS, 0.3, training=True),
    "gumbel": lambda: -torch.empty(COUNT, dtype=torch.float32).exponential_().log(),
}


def stateless(draw: Callable[[], Tensor], seed: int = 5) -> Tensor:
    numbers = iter(range(1, 100))
    with StatelessRandom(lambda: (torch.tensor(seed), next(numbers)), lambda: None):
        return draw()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution_is_that_of_torch(name: str) -> None:
    """Kolmogorov and Smirnov's distance of two samples, and the same type and layout."""
    draw = DISTRIBUTIONS[name]
    got, want = stateless(draw), draw()
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    a, b = got.double().flatten().sort().values, want.double().flatten().sort().values
    points = torch.cat([a, b])
    below = [torch.searchsorted(x, points, right=True) / len(x) for x in (a, b)]
    assert (below[0] - below[1]).abs().max() < 1.95 * (2 / len(a)) ** 0.5
    assert torch.equal(stateless(draw), got)
    assert torch.equal(stateless(draw, 6), got) == (name == "dropout_of_all")


def test_calls_differ_and_are_independent() -> None:
    numbers = stateless(lambda: torch.stack([torch.rand(COUNT) for _ in range(6)]), 7)
    correlation = torch.corrcoef(numbers)
    assert (correlation - torch.eye(6)).abs().max() < 5 / COUNT**0.5
    shifted = torch.corrcoef(torch.stack([numbers[0, 1:], numbers[0, :-1]]))[0, 1]
    assert abs(float(shifted)) < 5 / COUNT**0.5


def test_permutations_and_choices_are_without_repetition() -> None:
    assert torch.equal(stateless(lambda: torch.randperm(500)).sort().values, torch.arange(500))
    picked = stateless(lambda: torch.multinomial(torch.rand(300, 9).clamp(min=0.01), 9))
    assert torch.equal(picked.sort(-1).values, torch.arange(9).expand(300, 9))


REFUSED = {"poisson", "binomial", "_sample_dirichlet", "_standard_gamma"}
COMPOSITE = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "rrelu", "lstm", "gru",
    "rnn_relu", "rnn_tanh", "_no_grad_normal", "_no_grad_uniform",
    "_nested_tensor_softmax_with_shape",
}  # fmt: skip
"""Take themselves apart before a rewrite below autograd sees them, or are no dense op."""
WITH_A_RATE = {"dropout_p", "dropout"}
"""Arguments of fused kernels that draw nothing where they are zero, and are refused otherwise."""


def test_every_random_op_of_aten_has_a_form_or_is_refused() -> None:
    unknown = set()
    for name in {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}:
        packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
        for op in (getattr(packet, overload) for overload in packet.overloads()):
            names = {a.name for a in op._schema.arguments}
            if _compat.is_random(op) and "out" not in names and not names & WITH_A_RATE:
                unknown.add(name.removeprefix("aten::").removesuffix("_"))
    assert unknown - set(FORMS) - COMPOSITE == REFUSED


@pytest.mark.parametrize(
    "draw",
    [
        lambda y: torch.poisson(y.exp()),
        lambda y: torch._standard_gamma(y.exp()),
    ],
)
def test_what_cannot_be_drawn_again_is_refused(draw: Noise) -> None:
    def fn(ids: Tensor, v: Tensor) -> Tensor:
        x = F.embedding(ids, TABLE) * v
        return (x * draw(x.detach())).sum()

    with pytest.raises(UnsupportedOpError, match="drawn again") as caught:
        streamed(fn, 4)(IDS, nn.Parameter(torch.ones(D)))
    assert "test_random.py" in (caught.value.source or "")
    assert caught.value.advice
