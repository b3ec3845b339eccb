"""Tables sliced to the length, prompts before the tokens, K/V prefixes: value and every gradient
equal plain autograd's in float64, for several lengths in one capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as fn
from double import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.runtime.counters import COUNTER

D, V, ROWS, PROMPT = 8, 11, 40, 5
Form = Callable[["Model", int], Tensor]


class Model(nn.Module):
    """``start`` (how the stream begins), then per layer a table, made and used in some way."""

    def __init__(self, start: str, layers: list[tuple[str, str]]) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(2)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64) * 0.4)

        self.start, self.layers = start, layers
        self.embedding, self.head = parameter(V, D), parameter(D, V)
        self.table, self.wide, self.square = (
            parameter(ROWS, D),
            parameter(1, ROWS, D),
            parameter(D, D),
        )
        self.register_buffer("buffer", parameter(ROWS, D).detach())
        self.register_buffer("triangle", torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool).tril())

    def forward(self, ids: Tensor) -> Tensor:
        x = STARTS[self.start](self, ids)
        for table, use in self.layers:
            x = attention(self, USES[use](self, x, TABLES[table](self, x.shape[1])))
        x = x[:, x.shape[1] - ids.shape[1] :]
        return fn.cross_entropy((x @ self.head).flatten(0, 1), ids.flatten())


def attention(m: Model, x: Tensor) -> Tensor:
    q = (fn.layer_norm(x, (D,)) @ m.square)[:, None]
    return x + fn.scaled_dot_product_attention(q, q, x[:, None], is_causal=True)[:, 0]


TABLES: dict[str, Form] = {
    "first": lambda m, t: m.table[:t],
    "batched": lambda m, t: m.wide[:, :t],
    "last": lambda m, t: m.table[-t:],
    "offset": lambda m, t: m.table[3 : 3 + t],
    "narrow": lambda m, t: m.table.narrow(0, 2, t),
    "of two": lambda m, t: m.table[1:][: t + 1][1:],
    "split": lambda m, t: m.table.split([t, ROWS - t])[0],
    "strided": lambda m, t: m.table[::2][:t],
    "transposed": lambda m, t: m.table.t()[:, :t].t(),
    "product": lambda m, t: (m.table @ m.square)[:t],
    "activated": lambda m, t: fn.gelu(m.table[:t]),
    "normalised": lambda m, t: fn.layer_norm(m.table[:t], (D,)),
    "projected": lambda m, t: m.table[:t] @ m.square,
    "selected": lambda m, t: m.table[torch.arange(t)],
    "index_select": lambda m, t: m.table.index_select(0, torch.arange(t)),
    "looked up": lambda m, t: fn.embedding(torch.arange(t), m.table),
    "buffer": lambda m, t: m.buffer[:t],
    "flipped": lambda m, t: m.table[:t].flip(0),
    "cumulated": lambda m, t: m.table[:t].cumsum(0),
    "mixed": lambda m, t: m.table[:t] * m.buffer[-t:] + m.wide[0, 1 : t + 1],
    "interpolated": lambda m, t: fn.interpolate(m.wide.transpose(1, 2), size=t)[0].t(),
}


def prefix(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Attention of a fused projection, with learned keys and values before the tokens' own."""
    t, n = x.shape[1], 6
    qkv = x @ torch.cat([m.square, m.square * p.mean(), m.square.t()], 1)
    q, k, v = qkv.view(*x.shape[:2], 3, 2, D // 2).permute(2, 0, 3, 1, 4).unbind(0)
    past = m.wide[0, :n].view(n, 2, D // 2).transpose(0, 1).expand(len(x), -1, -1, -1)
    mask = torch.arange(t + n)[None] <= torch.arange(t)[:, None] + n
    k, v = torch.cat([past, k], 2), torch.cat([past * 2, v], 2)
    out = fn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x + out.transpose(1, 2).flatten(2)


USES: dict[str, Callable[[Model, Tensor, Tensor], Tensor]] = {
    "add": lambda m, x, p: x + p,
    "scale": lambda m, x, p: x * p.sigmoid(),
    "expand": lambda m, x, p: x + p.expand(x.shape),
    "mean": lambda m, x, p: x + p.reshape(-1, D).mean(0),
    "keys": lambda m, x, p: x + ((x @ p.reshape(-1, D).t()).softmax(-1) @ p.reshape(-1, D)),
    "join": lambda m, x, p: torch.cat([x, p.expand(x.shape)], -1)[..., ::2],
    "bias": lambda m, x, p: x
    + (p.reshape(-1, D) @ x.transpose(1, 2)).tril().softmax(-1) @ x,
    "prefix": prefix,
    "masked": lambda m, x, p: x
    + ((x @ x.transpose(1, 2)).masked_fill(
        ~m.triangle[0, :, : x.shape[1], : x.shape[1]], -1e9
    ).softmax(-1) @ (x * p)),
}  # fmt: skip


def prompt(m: Model, ids: Tensor) -> Tensor:
    return torch.cat(
        [m.wide[:, :PROMPT].expand(len(ids), -1, -1), fn.embedding(ids, m.embedding)], 1
    )


def framed(m: Model, ids: Tensor) -> Tensor:
    """Two tokens of other tables before, and a class token in front of them."""
    token = m.table[:1].expand(len(ids), 1, D)
    return torch.cat(
        [token, m.wide[:, 7:9].expand(len(ids), 2, D), fn.embedding(ids, m.embedding)], 1
    )


def padded(m: Model, ids: Tensor) -> Tensor:
    return fn.pad(fn.embedding(ids, m.embedding), (0, 0, 3, 0), value=0.5)


STARTS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "tokens": lambda m, ids: fn.embedding(ids, m.embedding),
    "prompt": prompt,
    "framed": framed,
    "padded": padded,
}


@dataclass(frozen=True)
class Case:
    start: str
    layers: list[tuple[str, str]]
    batch: int
    lengths: tuple[int, ...]
    chunk: int


def check(case: Case) -> None:
    torch.compiler.reset()
    model = Model(case.start, case.layers)
    plan = Plan(stream=Stream(chunk=case.chunk, loss_chunk=case.chunk))
    streamed = torch.compile(model, backend=fxmem.backend(plan), fullgraph=True)
    before = COUNTER.captures
    for length in case.lengths:
        ids = torch.randint(
            V, (case.batch, length), generator=torch.Generator().manual_seed(length)
        )
        found = []
        for f in (model, streamed):
            model.zero_grad()
            loss = f(ids)
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append({"loss": loss.detach(), **grads})
        error, name = largest_difference(found[1], found[0])
        assert error < 1e-10, f"{name} differs by {error:.1e} at {length} in {case}"
    assert COUNTER.captures > before


@pytest.mark.parametrize("use", USES)
def test_each_use_of_a_table(use: str) -> None:
    check(Case("tokens", [("batched", use)], 2, (13, 7), 4))


@pytest.mark.parametrize("table", TABLES)
def test_each_table(table: str) -> None:
    check(Case("tokens", [(table, "add")], 2, (13, 6), 5))


@pytest.mark.parametrize("start", STARTS)
def test_each_start(start: str) -> None:
    check(Case(start, [("first", "add"), ("offset", "scale")], 2, (11, 4), 3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layer = st.tuples(st.sampled_from(sorted(TABLES)), st.sampled_from(sorted(USES)))
    lengths = draw(st.tuples(st.integers(3, 17), st.integers(3, 17)))
    chunk = draw(st.sampled_from((1, 2, 3, 5, 7, max(1, lengths[0] - 1), lengths[0], 30)))
    start = draw(st.sampled_from(sorted(STARTS)))
    return Case(start, draw(st.lists(layer, max_size=3)), draw(st.integers(1, 3)), lengths, chunk)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=4, suppress_health_check=QUIET)
@given(cases())
def test_random_tables(case: Case) -> None:
    check(case)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=300, suppress_health_check=QUIET)
@given(cases())
def test_many_random_tables(case: Case) -> None:
    check(case)
