"""Oracle on whole programs: random small models, streamed against plain autograd in float64.

A program is a list of steps on ``x [B, T, D]`` with its weights. Value and every gradient must
agree to 1e-10 of their largest element for any chunk. Run the long search with ``-m fuzz``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from double import largest_difference
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from noises import NOISES
from torch import Tensor, nn
from torch.nn import functional as fn
from vocabulary import WORDS, spoken
from vocabulary_losses import LOSSES

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


def past_blocks(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    """What is left of the length after whole blocks, where there are none."""
    whole = x.shape[1] // 8 * 8
    rest = fn.linear(x, p.w(i, "square"))[:, whole:]
    return x + rest if whole == 0 else linear(p, i, x, ids)


def hooked(p: Program, i: int, x: Tensor, ids: Tensor) -> Tensor:
    """A module with hooks on its input and its output."""
    return x + p.inner(x).tanh()


STEPS: dict[str, Step] = {
    s.__name__: s for s in (
        linear, layer_norm, rms_norm, mlp, gate, attention, grouped_attention, full_attention,
        softmax, shift, pooled, embed, gather, join, squeeze, rearrange, hooked, past_blocks,
    )
}  # fmt: skip


SHAPES = {
    "square": (D, D), "key": (D, D), "value": (D, D), "up": (D, 2 * D), "down": (2 * D, D),
    "bias": (D,), "scale": (D,), "half": (2, 1, D // 2), "table": (VOCAB, D), "head": (D, VOCAB),
}  # fmt: skip


class Program(nn.Module):
    """``sides`` are a second state that is read, and the state returned beside the loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.weights = nn.ParameterDict()
        self.inner = nn.Linear(D, D).double()
        self.inner.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
        self.inner.register_forward_hook(lambda _, args, out: out + args[0].sin())
        used = torch.Generator().manual_seed(3)
        for p in self.inner.parameters():
            p.data.normal_(generator=used)
        for i in range(len(case.steps) + 1):
            for name, shape in SHAPES.items():
                value = torch.randn(shape, generator=used, dtype=torch.float64) * 0.4
                self.weights[f"{name}{i}"] = nn.Parameter(value)

    def w(self, i: int, name: str) -> Tensor:
        return self.weights[f"{name}{i}"]

    def forward(self, x: Tensor, ids: Tensor, other: Tensor | None = None) -> Any:
        for i, name in enumerate(self.case.steps):
            if name in STEPS:
                x = STEPS[name](self, i, x, ids)
            elif name in NOISES:
                x = x + 0.5 * torch.tanh(NOISES[name](linear(self, i, x, ids)))
            else:
                x = spoken(name, linear(self, i, x, ids), ids)
            if other is not None and i == 0:
                x = x + other.tanh() @ self.w(i, "value")
        last = len(self.case.steps)
        y = x * self.w(last, "scale")
        loss = LOSSES[self.case.loss](y, y @ self.w(last, "head"), ids).mean()
        return (loss, x) if other is not None else loss


@dataclass(frozen=True)
class Case:
    steps: list[str]
    loss: str
    batch: int
    lengths: tuple[int, ...]
    chunk: int
    loss_chunk: int
    input_grad: bool = field(default=True)
    sides: bool = field(default=False)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = draw(st.integers(3, 17))
    chunk = st.sampled_from(sorted({1, 2, 3, 5, 7, 11, length - 1, length, length + 4}))
    return Case(
        draw(st.lists(st.sampled_from(sorted({*STEPS, *WORDS, *NOISES})), min_size=1, max_size=4)),
        draw(st.sampled_from(sorted(LOSSES))), draw(st.integers(1, 3)),
        (length, *draw(st.sampled_from([(), (length + 5,), (9,)]))), draw(chunk), draw(chunk),
        draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


def results(model: Callable[..., Any], program: Program, length: int) -> dict[str, Tensor]:
    case, source = program.case, torch.Generator().manual_seed(5)
    shape = (case.batch, length, D)
    x, other = (torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(VOCAB, (case.batch, length), generator=source)
    x.requires_grad_(case.input_grad)
    program.zero_grad()
    torch.manual_seed(3)
    if case.sides:
        loss, state = model(x, ids, other.requires_grad_())
        (loss + 0.1 * (state * torch.arange(D).cos()).sum()).backward()
    else:
        loss = model(x, ids)
        loss.backward()
    out = {n: p.grad.clone() for n, p in program.named_parameters() if p.grad is not None}
    out |= {n: v.grad for n, v in (("x", x), ("other", other)) if v.grad is not None}
    return {**out, "loss": loss.detach()}


def streamed(program: Program, chunk: int, loss_chunk: int) -> Any:
    """A state that is returned is read: where the batch streams it is wide enough to be dropped."""
    torch.compiler.reset()
    logits: Any = "keep" if program.case.sides else "drop"
    plan = Plan(stream=Stream(chunk=chunk, loss_chunk=loss_chunk, logits=logits))
    return torch.compile(program, backend=fxmem.backend(plan), fullgraph=True)


def check(case: Case) -> None:
    """Against plain autograd, or where numbers are drawn, against one chunk."""
    program = Program(case)
    longest = max(case.lengths)
    drawn = any(s in NOISES for s in case.steps)
    plain = streamed(program, longest, longest) if drawn else program
    want = [results(plain, program, length) for length in case.lengths]
    step = streamed(program, case.chunk, case.loss_chunk)
    for length, wanted in zip(case.lengths, want, strict=True):
        error, name = largest_difference(results(step, program, length), wanted)
        assert error < 1e-10, f"{name} differs by {error:.1e} at {length} in {case}"


FEW = ("tokens", "preference", "squares")
PAIRS = [
    pytest.param(step, loss, marks=[pytest.mark.slow] if (i - j) % len(FEW) else [])
    for i, step in enumerate(STEPS)
    for j, loss in enumerate(FEW)
]
"""Every step with one of the losses, in turn; with the others where there is time."""


@pytest.mark.parametrize(("step", "loss"), PAIRS)
def test_each_step_alone(step: str, loss: str) -> None:
    check(Case([step], loss, 2, (7,), 3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("word", sorted(WORDS))
def test_each_word_alone(word: str) -> None:
    check(Case([word], "squares", 2, (9,), 3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_alone(loss: str) -> None:
    check(Case(["attention"], loss, 2, (9, 12), 4, 5, sides=True))


def test_the_vocabulary_is_wide() -> None:
    assert len({*STEPS, *WORDS, *NOISES}) >= 120 and len(LOSSES) >= 25


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


# two log-probabilities of the same logits: one's gradient overwrote what the other reads
@example(Case(["linear"], "focal", 2, (9, 12), 4, 4))
@example(Case(["linear"], "halves", 2, (9,), 4, 4))
# a slice whose bounds are no polynomial of the length
@example(Case(["past_blocks"], "squares", 2, (4, 3), 2, 2))
# a length that torch fixes: the batch streams, and the state is returned
@example(Case(["hooked"], "two_ahead", 2, (3, 8), 2, 2, sides=True))
@settings(max_examples=8, suppress_health_check=QUIET)
@given(cases())
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_random_programs(case: Case) -> None:
    check(case)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=300, suppress_health_check=QUIET)
@given(cases())
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_many_random_programs(case: Case) -> None:
    check(case)
