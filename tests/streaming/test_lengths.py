"""What is computed from the length is exact at every length, in one capture or in several.

A program puts a size made from the length (``T // 2``, ``min(3, T)``, ``(-T) % 4``, ``sqrt(T)``) to
some use: a slice, a padding, a factor, an index. It runs at lengths on both sides of its constants,
one after the other, so that code traced at one length meets the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from double import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as fn

import fxmem
from fxmem import FxmemWarning, Plan, Stream

D, VOCAB = 4, 7
Use = Callable[[Tensor, Tensor, int, int], Tensor]
"""``use(x, y, t, n) -> [B, T, D]`` from ``x`` and ``y = x W``, both ``[B, T, D]``, and a size."""

SIZES: dict[str, Callable[[int], int]] = {
    "half": lambda t: t // 2, "half_up": lambda t: (t + 1) // 2, "quarter": lambda t: (t + 3) // 4,
    "some_half": lambda t: max(1, t // 2), "at_most_3": lambda t: min(3, t),
    "at_least_8": lambda t: max(t, 8), "longer": lambda t: t + 2, "to_four": lambda t: (-t) % 4,
    "rest": lambda t: t % 3 + 1, "double": lambda t: 2 * t, "root": lambda t: int(math.sqrt(t)),
    "at_most_256": lambda t: min(256, t), "all_but_3": lambda t: max(t - 3, 1),
    "square": lambda t: t * t,
}  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    return fn.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=causal)[
        :, 0
    ]


def masked(q: Tensor, k: Tensor) -> Tensor:
    rows, keys = torch.arange(q.shape[1]), torch.arange(k.shape[1])
    mask = rows[:, None] >= keys
    return fn.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None], attn_mask=mask)[:, 0]


def some_rows(x: Tensor) -> Tensor:
    out = x.clone()
    out[x.detach()[..., 0] > 0] = x[0, 0] * 2
    return out


USES: dict[str, Use] = {
    "head": lambda x, y, t, n: x + y[:, :n].sum(1, keepdim=True),
    "tail": lambda x, y, t, n: x + y[:, -max(n, 1) :].sum(1, keepdim=True),
    "without_head": lambda x, y, t, n: x + y[:, n:].sum(1, keepdim=True),
    "first_keys": lambda x, y, t, n: x + attend(y, x[:, : max(n, 1)], y[:, : max(n, 1)]),
    "pad_behind": lambda x, y, t, n: x + fn.pad(y, (0, 0, 0, n)).cumsum(1)[:, :t],
    "pad_before": lambda x, y, t, n: x + fn.pad(y, (0, 0, n, 0))[:, :t],
    "shift": lambda x, y, t, n: x + fn.pad(y, (0, 0, min(n, t), -min(n, t))),
    "shift_back": lambda x, y, t, n: x + fn.pad(y, (0, 0, -min(n, t), min(n, t))),
    "arange": lambda x, y, t, n: x + y * torch.arange(n).sum() * 0.01,
    "expand": lambda x, y, t, n: x + y[:, :1].expand(-1, n, -1).sum(1, keepdim=True),
    "topk": lambda x, y, t, n: x + y.topk(min(max(n, 1), t), 1).values.mean(1, keepdim=True),
    "factor": lambda x, y, t, n: x + y * n,
    "divisor": lambda x, y, t, n: x + y.sum(1, keepdim=True) / max(n, 1),
    "power": lambda x, y, t, n: x + y * max(n, 1) ** -0.5,
    "root": lambda x, y, t, n: x + y * math.sqrt(n),
    "inverse": lambda x, y, t, n: x + y * (1 / max(n, 1)),
    "zeros": lambda x, y, t, n: x + torch.cat([y.new_zeros(len(y), n, D), y], 1)[:, :t],
    "roll": lambda x, y, t, n: x + torch.roll(y, n, 1),
    "resize": lambda x, y, t, n: x + fn.interpolate(y.mT, size=max(n, 1)).mean(2)[:, None],
    "split": lambda x, y, t, n: x + y.split([min(n, t), t - min(n, t)], 1)[1].sum(1, keepdim=True),
    "index": lambda x, y, t, n: x + y[:, min(n, t - 1)][:, None],
    "gather": lambda x, y, t, n: x + y[:, torch.arange(min(max(n, 1), t))].mean(1, keepdim=True),
    "rows_below": lambda x, y, t, n: x + y * (torch.arange(t) < n)[:, None],
    "either": lambda x, y, t, n: x + (attend(y, x, y) if n > t else y.square()),
}
FIXED: dict[str, Use] = {
    "every_second": lambda x, y, t, n: x + y[:, ::2].mean(1, keepdim=True),
    "first_8": lambda x, y, t, n: x + y[:, :8].sum(1, keepdim=True),
    "halves": lambda x, y, t, n: x + y.chunk(2, 1)[0].sum(1, keepdim=True),
    "blocks": lambda x, y, t, n: (
        fn.pad(y, (0, 0, 0, (-t) % 4)).unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)[:, :t] + x
    ),
    "twice": lambda x, y, t, n: x + y.repeat(1, 2, 1)[:, :t],
    "flip": lambda x, y, t, n: x + y.flip(1),
    "linspace": lambda x, y, t, n: x + y * torch.linspace(0, 1, t)[:, None],
    "triangle": lambda x, y, t, n: x + torch.tril(torch.ones(t, t, dtype=y.dtype)) @ y,
    "pool": lambda x, y, t, n: x + fn.adaptive_avg_pool1d(y.mT, 2).mean(2)[:, None],
    # torch's backward takes the length for a number
    "products": lambda x, y, t, n: x + torch.ops.aten.cumprod(y.sigmoid(), 1),
    # rows whose number follows from values
    "some_rows": lambda x, y, t, n: x + some_rows(y),
    # attention of queries and keys that are not the tokens
    "two_of_each": lambda x, y, t, n: attend(z := torch.cat([x, y], 1), z, z, True)[:, t:],
    "two_masked": lambda x, y, t, n: masked(z := torch.cat([x, y], 1), z)[:, t:],
    "interleaved": lambda x, y, t, n: (
        x + attend(z := y.repeat_interleave(2, 1), z, z, True)[:, ::2]
    ),
    "all_but_one": lambda x, y, t, n: (
        x + fn.pad(attend(y[:, 1:], x[:, 1:], y[:, 1:], True), (0, 0, 1, 0)) if t > 1 else x
    ),
    "all_but_one_masked": lambda x, y, t, n: (
        x + fn.pad(masked(y[:, 1:], x[:, 1:]), (0, 0, 1, 0)) if t > 1 else x
    ),
    "fewer_keys": lambda x, y, t, n: x + attend(y, x[:, 1:], y[:, 1:], True) if t > 1 else x,
    "later_keys": lambda x, y, t, n: x + masked(y, x[:, 1:]) if t > 1 else x,
    "more_keys": lambda x, y, t, n: x + attend(y, torch.cat([x, y], 1), torch.cat([y, x], 1), True),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, use: str, size: str) -> None:
        super().__init__()
        self.use, self.size = ({**USES, **FIXED})[use], SIZES[size]
        source = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64) * 0.4)

        self.table, self.head = weight(VOCAB, D), weight(D, VOCAB)
        self.mix, self.last = weight(D, D), weight(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        x, t = fn.embedding(ids, self.table), ids.shape[1]
        x = self.use(x, x @ self.mix, t, self.size(t))
        x = x + fn.silu(x @ self.last)
        return fn.cross_entropy((x @ self.head).flatten(0, 1), ids.flatten())


def step(model: nn.Module, call: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = call(ids)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def check(use: str, size: str, chunk: int, lengths: Sequence[int]) -> None:
    torch.compiler.reset()
    model = Model(use, size)
    plan = Plan(stream=Stream(chunk=chunk, loss_chunk=chunk))
    streamed = torch.compile(model, backend=fxmem.backend(plan), fullgraph=True)
    for length in lengths:
        ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
        want = step(model, model, ids)
        error, name = largest_difference(step(model, streamed, ids), want)
        assert error < 1e-10, f"{name} differs by {error:.1e} at {length} tokens"


ALL = [*itertools.product(USES, SIZES), *((u, "half") for u in FIXED)]
SAMPLE = [
    ("head", "some_half"), ("index", "half"), ("topk", "at_most_3"), ("root", "longer"),
    ("pad_behind", "to_four"), ("shift", "half"), ("divisor", "root"), ("roll", "rest"),
    ("zeros", "at_least_8"), ("split", "quarter"),
]  # fmt: skip


@pytest.mark.parametrize(("use", "size"), SAMPLE)
def test_sizes_computed_from_the_length(use: str, size: str) -> None:
    check(use, size, 4, (4, 9, 2))


@pytest.mark.parametrize("use", FIXED)
def test_uses_of_the_length(use: str) -> None:
    check(use, "half", 4, (5, 13))


def test_a_trace_that_fixes_the_length_is_named() -> None:
    with pytest.warns(FxmemWarning, match=r"fixes the length.*every length is captured anew"):
        check("products", "half", 4, (5,))


@pytest.mark.parametrize("use", ["head", "shift", "topk", "blocks"])
def test_a_single_token(use: str) -> None:
    check(use, "some_half", 4, (1,))


@pytest.mark.slow
@pytest.mark.parametrize(("use", "size"), ALL)
def test_every_size_in_every_use(use: str, size: str) -> None:
    check(use, size, 4, (4, 13, 9, 3, 2, 17, 8, 1))


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(ALL),
    st.sampled_from([1, 3, 4, 30]),
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_random_lengths_in_any_order(what: tuple[str, str], chunk: int, lengths: list[int]) -> None:
    check(*what, chunk, lengths)
