"""Ops that hand a state from chunk to chunk: exact for every chunk size, and no barrier."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from double import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxmem
from fxmem import Plan, Stream, rules
from fxmem.axes import AxisRule, Call, Signature
from fxmem.backends.stats import STATS
from fxmem.kernels.carried import linear_recurrence
from fxmem.program.steps import Program

D, VOCAB = 6, 11
Word = Callable[["Model", Tensor], Tensor]


def _conv(padding: int, dilation: int = 1, groups: int = 1) -> Word:
    """A convolution that pads both ends, less what is behind the last token."""

    def word(m: Model, x: Tensor) -> Tensor:
        weight = m.kernel[:, : D // groups]
        y = F.conv1d(x.mT, weight, m.bias, padding=padding, dilation=dilation, groups=groups)
        return y[..., : x.shape[1]].mT

    return word


def _padded_conv(m: Model, x: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.mT, (2, 0)), m.kernel[:, :1], groups=D).mT


def _two_ways(m: Model, x: Tensor) -> Tensor:
    return x.cumsum(1).sin() * x.flip(1).cumsum(1).flip(1).cos()


def _recurrence(m: Model, x: Tensor, reverse: bool = False) -> Tensor:
    return linear_recurrence((x * m.bias).sigmoid(), x, 1, reverse)[0]


WORDS: dict[str, Word] = {
    "cumsum": lambda m, x: x.cumsum(1) / 4,
    "cumsum_of_heads": lambda m, x: x.unflatten(-1, (2, 3)).transpose(1, 2).cumsum(2)
    .transpose(1, 2).flatten(-2),
    "cumsum_from_the_end": lambda m, x: x.flip(1).cumsum(1).flip(1).tanh(),
    "both_ways": _two_ways,
    "twice": lambda m, x: x.cumsum(1).sigmoid().cumsum(1).sin(),
    "cumprod": lambda m, x: (1 + x / 10).cumprod(1),
    "cumprod_with_zeros": lambda m, x: torch.where(x > 0.5, 0.0, 1 + x / 10).cumprod(1),
    "logcumsumexp": lambda m, x: x.logcumsumexp(1),
    "conv": _conv(2), "dilated_conv": _conv(4, dilation=2), "grouped_conv": _conv(2, groups=2),
    "depthwise_conv": _conv(2, groups=D), "padded_conv": _padded_conv,
    "shift_by_pad": lambda m, x: F.pad(x[:, :-1], (0, 0, 1, 0)),
    "shift_by_cat": lambda m, x: torch.cat([torch.zeros_like(x[:, :2]), x[:, :-2]], 1),
    "shift_by_negative_pad": lambda m, x: F.pad(x, (0, 0, 1, -1)),
    "shift_back": lambda m, x: F.pad(x[:, 1:], (0, 0, 0, 1)),
    "recurrence": _recurrence,
    "recurrence_from_the_end": lambda m, x: _recurrence(m, x, True),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, words: list[str]) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(3)
        draw = lambda *s: nn.Parameter(  # noqa: E731
            torch.randn(s, generator=source, dtype=torch.float64) * 0.4
        )
        self.words = words
        self.table, self.head = draw(VOCAB, D), draw(D, VOCAB)
        self.kernel, self.bias, self.square = draw(D, D, 3), draw(D), draw(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids]
        for word in self.words:
            x = x + WORDS[word](self, (x @ self.square).tanh())
        return F.cross_entropy((x @ self.head)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(ids)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def check(words: list[str], chunk: int, *, hold: str = "auto", batch: int = 2) -> fxmem.Report:
    """Two lengths by one capture; every operator streams."""
    torch.compiler.reset()
    model = Model(words)
    source = torch.Generator().manual_seed(5)
    given = [torch.randint(VOCAB, (batch, n), generator=source) for n in (13, 9)]
    want = [step(model, ids) for ids in given]
    fxmem.transform(model, Plan(stream=Stream(chunk=chunk, loss_chunk=chunk, hold=hold)))
    for ids, one in zip(given, want, strict=True):
        error, name = largest_difference(step(model, ids), one)
        assert error < 1e-10, f"{name} differs by {error:.1e} for {words} in chunks of {chunk}"
    report = fxmem.explain(model)
    assert not report.barriers, report.barriers
    assert report.executed_bodies
    return report


@pytest.mark.parametrize("word", WORDS)
def test_each_word(word: str) -> None:
    check([word], 5)


@pytest.mark.parametrize("chunk", [1, 3, 12, 13, 20])
@pytest.mark.parametrize("word", ["both_ways", "dilated_conv"])
def test_each_chunk_size(word: str, chunk: int) -> None:
    check([word], chunk, hold="none" if chunk == 3 else "auto", batch=1 + chunk % 2)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
PROGRAMS = st.lists(st.sampled_from(sorted(WORDS)), min_size=2, max_size=4)
CHUNKS = st.sampled_from([1, 2, 3, 7, 12, 13, 17])
HOLDS = st.sampled_from(["auto", "none"])


@settings(max_examples=6, suppress_health_check=QUIET)
@given(PROGRAMS, CHUNKS, HOLDS)
def test_random_programs(words: list[str], chunk: int, hold: str) -> None:
    check(words, chunk, hold=hold)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=200, suppress_health_check=QUIET)
@given(PROGRAMS, CHUNKS, HOLDS)
def test_many_random_programs(words: list[str], chunk: int, hold: str) -> None:
    check(words, chunk, hold=hold)


@torch.library.custom_op("fxmem_tests::smooth", mutates_args=())
def smooth(x: Tensor, keep: float, back: bool) -> tuple[Tensor, Tensor]:
    state = x.new_zeros(1, x.shape[0], x.shape[2])
    return smooth_step(state, x, keep, back)[0], state


def smooth_step(state: Tensor, x: Tensor, keep: float, back: bool) -> tuple[Tensor, Tensor]:
    y, rows = state[0], []
    for row in reversed(x.unbind(1)) if back else x.unbind(1):
        y = keep * y + row
        rows.append(y)
    done = torch.stack(rows[:: -1 if back else 1], 1) if rows else x.clone()
    return done, y.clone().unsqueeze(0)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return smooth(grad, ctx.keep, not ctx.back)[0], None, None


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ctx.keep, ctx.back = inputs


smooth.register_fake(
    lambda x, keep, back: (torch.empty_like(x), x.new_empty(1, x.shape[0], x.shape[2]))
)
smooth.register_autograd(_backward, setup_context=_setup)


def _smooth_row(call: Call) -> Signature:
    rows = (("b",), ("t",), ("d",))
    direction = -1 if call.args[2] else 1
    return Signature((rows,), (rows, ((), ("b",), ("d",))), carried={"t": direction})


def test_a_row_of_the_users_own() -> None:
    op = torch.ops.fxmem_tests.smooth.default
    rules.register(op, AxisRule(_smooth_row, step=smooth_step), replace=True)
    WORDS["smooth"] = lambda m, x: smooth(x, 0.5, False)[0]
    try:
        for chunk in (1, 5, 20):
            check(["smooth"], chunk)
    finally:
        del WORDS["smooth"], rules.TABLE[str(op)]


class Layers(nn.Module):
    """Layers between narrow waists, so that each is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.up = nn.ModuleList(nn.Linear(D, 4 * D) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(4 * D, D) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for up, down in zip(self.up, self.down, strict=True):
            y = up(F.layer_norm(x, (D,)))
            x = x + down(linear_recurrence(y.sigmoid(), y, 1, False)[0])
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(
    ("hold", "loops"), [("auto", ["descending"]), ("none", ["ascending", "descending"])]
)
def test_states_come_from_the_forward(hold: str, loops: list[str]) -> None:
    """With the states that the forward saw, the backward is one loop."""
    torch.compiler.reset()
    model = Layers().double()
    ids = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(2))
    want = step(model, ids)
    fxmem.transform(model, Plan(stream=Stream(chunk=4, loss_chunk=4, hold=hold)))
    got = step(model, ids)
    assert largest_difference(got, want)[0] < 1e-10
    ran = _programs(model, "backward+1" if hold == "auto" else "backward")
    assert [["ascending", "descending"][loop.descending] for loop in ran.loops] == loops


def _programs(model: nn.Module, kind: str) -> Program:
    (graph,) = fxmem.api._TRANSFORMED[model].graphs
    code = next(c.code for c in graph.calls if c.code.held)
    return code.program(kind)


def test_compiled_bodies() -> None:
    torch.compiler.reset()
    model = Layers().double()
    ids = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
    want = step(model, ids)
    fxmem.transform(model, Plan(stream=Stream(chunk=16, loss_chunk=16), lower="inductor"))
    STATS.failed.clear()
    for _ in range(2):
        assert largest_difference(step(model, ids), want)[0] < 1e-10
    assert not STATS.failed
