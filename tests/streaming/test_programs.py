"""Oracle on whole programs: random small models, streamed against plain autograd in float64.

A program is a list of steps on ``x [B, T, D]`` with its weights. Value and every gradient must
agree to 1e-10 of their largest element for any chunk. Run the long search with ``-m fuzz``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from double import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as fn
from vocabulary import WORDS, spoken

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 8, 13
Step = Callable[["Program", int, Tensor, Tensor], Tensor]


def linear(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return fn.linear(x, p.w(i, "square"), p.w(i, "bias"))


def layer_norm(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return fn.layer_norm(x, (D,), p.w(i, "scale"), p.w(i, "bias"))


def rms_norm(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * p.w(i, "scale")


def mlp(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return x + fn.gelu(x @ p.w(i, "up"), approximate="tanh") @ p.w(i, "down")


def gate(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    a, b = (x @ p.w(i, "up")).chunk(2, -1)
    return x + fn.silu(a) * b


def _heads(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def attention(
    p: Program, i: int, x: Tensor, ids: Tensor, groups: int = 4, causal: bool = True
) -> Tensor:
    q = _heads(x @ p.w(i, "square"), 4)
    k, v = (_heads(x @ p.w(i, n)[:, : 2 * groups], groups) for n in ("key", "value"))
    out = fn.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups < 4)
    return x + out.transpose(1, 2).reshape(x.shape)


def grouped_attention(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return attention(p, i, x, ids, groups=2)


def full_attention(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return attention(p, i, x, ids, causal=False)


def softmax(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return x + (x @ p.w(i, "square")).softmax(-1)


def shift(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    """Every token but the last is moved towards its successor."""
    step = torch.tanh(x[:, 1:] - x[:, :-1] @ p.w(i, "square"))
    return x + step.square().mean()


def pooled(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return x * torch.tanh(x.mean(1, keepdim=True)) + p.w(i, "bias") * (x * x).sum().log1p()


def embed(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return x + fn.embedding(ids, p.w(i, "table"))


def gather(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return x * (x @ p.w(i, "square")).gather(-1, (ids % D).unsqueeze(-1))


def squeeze(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    """Without an axis: in a chunk of one row the streamed axis must stay."""
    return x * torch.tanh((x @ p.w(i, "square"))[..., :1].squeeze().square().sum() * 0.1)


def join(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([x, torch.sin(x)], -1) @ p.w(i, "down")


def rearrange(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    b, t, _ = x.shape
    y = x.reshape(b * t, 2, D // 2).permute(1, 0, 2) * p.w(i, "half")
    return y.permute(1, 0, 2).reshape(b, t, D) + x.transpose(0, 1).transpose(1, 0)


STEPS: dict[str, Step] = {
    s.__name__: s for s in (
        linear, layer_norm, rms_norm, mlp, gate, attention, grouped_attention, full_attention,
        softmax, shift, pooled, embed, gather, join, squeeze, rearrange,
    )
}  # fmt: skip


def token_loss(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    logits = x @ p.w(i, "head")
    return fn.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ratio_loss(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    """A nonlinear function of a sum over tokens, as in preference losses."""
    picked = (x @ p.w(i, "head")).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return -fn.logsigmoid(0.3 * picked.sum(1)).mean()


def square_loss(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    return (x * p.w(i, "scale")).square().mean()


LOSSES: dict[str, Step] = {s.__name__: s for s in (token_loss, ratio_loss, square_loss)}

SHAPES = {
    "square": (D, D), "key": (D, D), "value": (D, D), "up": (D, 2 * D), "down": (2 * D, D),
    "bias": (D,), "scale": (D,), "half": (2, 1, D // 2), "table": (VOCAB, D), "head": (D, VOCAB),
}  # fmt: skip


class Program(nn.Module):
    def __init__(self, steps: list[str], loss: str) -> None:
        super().__init__()
        self.steps, self.loss = steps, loss
        self.weights = nn.ParameterDict()
        used = torch.Generator().manual_seed(3)
        for i in range(len(steps) + 1):
            for name, shape in SHAPES.items():
                value = torch.randn(shape, generator=used, dtype=torch.float64) * 0.4
                self.weights[f"{name}{i}"] = nn.Parameter(value)

    def w(self, i: int, name: str) -> Tensor:
        return self.weights[f"{name}{i}"]

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for i, name in enumerate(self.steps):
            if name in STEPS:
                x = STEPS[name](self, i, x, ids)
            else:
                x = spoken(name, linear(self, i, x, ids), ids)
        return LOSSES[self.loss](self, len(self.steps), x, ids)


@dataclass(frozen=True)
class Case:
    steps: list[str]
    loss: str
    batch: int
    length: int
    chunk: int
    loss_chunk: int
    input_grad: bool = field(default=True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = draw(st.integers(3, 17))
    chunk = st.sampled_from(sorted({1, 2, 3, 5, 7, 11, length - 1, length, length + 4}))
    return Case(
        draw(st.lists(st.sampled_from(sorted({*STEPS, *WORDS})), min_size=1, max_size=4)),
        draw(st.sampled_from(sorted(LOSSES))),
        draw(st.integers(1, 3)), length, draw(chunk), draw(chunk), draw(st.booleans()),
    )  # fmt: skip


def results(model: Callable[..., Tensor], program: Program, case: Case) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(5)
    x = torch.randn(case.batch, case.length, D, generator=source, dtype=torch.float64)
    ids = torch.randint(VOCAB, (case.batch, case.length), generator=source)
    x.requires_grad_(case.input_grad)
    program.zero_grad()
    loss = model(x, ids)
    loss.backward()
    out = {n: p.grad.clone() for n, p in program.named_parameters() if p.grad is not None}
    out["loss"] = loss.detach()
    if case.input_grad:
        assert x.grad is not None
        out["x"] = x.grad
    return out


def check(case: Case) -> None:
    torch.compiler.reset()
    program = Program(case.steps, case.loss)
    want = results(program, program, case)
    plan = Plan(stream=Stream(chunk=case.chunk, loss_chunk=case.loss_chunk))
    streamed = torch.compile(program, backend=fxmem.backend(plan), fullgraph=True)
    got = results(streamed, program, case)
    error, name = largest_difference(got, want)
    assert error < 1e-10, f"{name} differs by {error:.1e} in {case}"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("step", STEPS)
def test_each_step_alone(step: str, loss: str) -> None:
    check(Case([step], loss, 2, 7, 3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("word", sorted(WORDS))
def test_each_word_alone(word: str) -> None:
    check(Case([word], "square_loss", 2, 9, 3, 2))


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=12, suppress_health_check=QUIET)
@given(cases())
def test_random_programs(case: Case) -> None:
    check(case)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=300, suppress_health_check=QUIET)
@given(cases())
def test_many_random_programs(case: Case) -> None:
    check(case)
