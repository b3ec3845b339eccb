"""Attention with every argument that torch's function takes: streamed equals plain."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import PAD, TABLE, W2, Case, W, check, in_parts, parameter
from torch import Tensor, nn

import fxmem
from fxmem import VerificationError
from fxmem.kernels import attention as kernel

D = 8
KEY, PER_HEAD, PAIRS = parameter(D, D), parameter(1, 4, 1, 1), parameter(1, 1, 40, 40)
MHA = nn.MultiheadAttention(D, 2, batch_first=True).double()
MORE = {"key": KEY, "per_head": PER_HEAD, "pairs": PAIRS} | dict(MHA.named_parameters())
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(-2, -3)


def qkv(x: Tensor, groups: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (heads((x @ w)[..., : 2 * groups], groups) for w in (KEY, W2))
    return heads(x @ W, 4), k, v


def joined(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


def _rest(x: Tensor, out: Tensor) -> Tensor:
    """``out`` with the rows that it lacks against ``x``, as zeros in front."""
    return F.pad(out, (0, 0, x.shape[1] - out.shape[1], 0))


def _seen(ids: Tensor) -> Tensor:
    return ids != PAD


def _triangle(ids: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1])
    return at <= at.unsqueeze(-1)


def _both(ids: Tensor) -> Tensor:
    return _seen(ids)[:, None, None, :] & _seen(ids)[:, None, :, None]


def _minus(mask: Tensor, low: float = -math.inf) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def _striped(ids: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1])
    head = torch.arange(4)[:, None, None]
    return (head * 3 + at[:, None]) % 5 > at % 3


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "both": _both,
    "queries": lambda i: _seen(i)[:, None, :, None],
    "queries_of_one": lambda i: _seen(i)[:1, None, :, None],
    "queries_2d": lambda i: _seen(i)[0].unsqueeze(-1),
    "keys": lambda i: _seen(i)[:, None, None, :],
    "keys_2d": lambda i: _seen(i)[:1],
    "sequences": lambda i: _seen(i)[:, -1:, None, None],
    "all": lambda i: torch.ones(1, 1, dtype=torch.bool),
    "none": lambda i: torch.zeros(1, 1, dtype=torch.bool),
    "heads": _striped,
    "triangle": lambda i: _triangle(i) & _both(i),
    "added": lambda i: _minus(_both(i)),
    "added_queries": lambda i: _minus(_seen(i)[:, None, :, None], -100.0),
    "added_lowest": lambda i: _minus(_both(i), torch.finfo(torch.float64).min),
    "learned_heads": lambda i: PER_HEAD + 0,
    "learned_pairs": lambda i: PAIRS[..., : i.shape[1], : i.shape[1]],
    "learned_padded": lambda i: PER_HEAD[:, :1].masked_fill(~_both(i), -math.inf),
    "learned_triangle": lambda i: PER_HEAD + _minus(_triangle(i)),
}


def masked(name: str, groups: int = 4, causal: bool = False, rank: int = 4, p: float = 0) -> Case:
    def case(x: Tensor, ids: Tensor) -> Tensor:
        mask = MASKS[name](ids)
        if rank == 3:
            mask = mask[:, 0] if mask.dim() == 4 else mask[0] if name == "heads" else mask
            return sdpa(x @ W, x @ KEY, x @ W2, mask)
        q, k, v = qkv(x, groups)
        return joined(sdpa(q, k, v, mask, p, causal, enable_gqa=groups < 4))

    return case


MASKED = {name: masked(name) for name in MASKS}
MASKED |= {f"{name}_grouped": masked(name, groups=2) for name in MASKS}
MASKED |= {f"{name}_3d": masked(name, rank=3) for name in MASKS}


def _both_at_once() -> bool:
    """Torch takes a mask beside ``is_causal``, which 2.14 refuses."""
    x = torch.ones(1, 1, 2, 2)
    try:
        sdpa(x, x, x, torch.ones(2, 2, dtype=torch.bool), is_causal=True)
    except RuntimeError:
        return False
    return True


# what torch takes together with causality depends on the kernel that it picks
CAUSAL = {
    f"{n}_causal": masked(n, groups, causal=True)
    for n, groups in (("both", 4), ("queries", 2), ("keys", 4), ("added", 2), ("all", 4))
}


def shapes() -> dict[str, Case]:
    def given(f: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Case:
        return lambda x, ids: f(x, *qkv(x))

    def fixed() -> Tensor:
        return heads(TABLE @ KEY, 4)[None]

    return {
        "one_head_and_batch": lambda x, i: sdpa(
            (x @ W)[:, None], (TABLE @ KEY)[None, None], (TABLE @ W2)[None, None]
        )[:, 0],
        "keys_of_a_table_2d": lambda x, i: sdpa(x @ W, TABLE @ KEY, TABLE @ W2),
        "keys_of_one": given(lambda x, q, k, v: joined(sdpa(q, k[:1], v[:1], is_causal=True))),
        "values_of_one": given(lambda x, q, k, v: joined(sdpa(q, k, v[:1], is_causal=True))),
        "single_queries": given(lambda x, q, k, v: joined(sdpa(q[:1], k, v, is_causal=True))),
        "one_key_head": given(lambda x, q, k, v: joined(sdpa(q, k[:, :1], v[:, :1]))),
        "one_value_head": given(lambda x, q, k, v: joined(sdpa(q, k, v[:, 1:2], is_causal=True))),
        "one_query_head": given(lambda x, q, k, v: joined(sdpa(q[:, :1], k, v, is_causal=True))),
        "groups_differ": given(
            lambda x, q, k, v: joined(sdpa(q, k[:, :2], v[:, :1], is_causal=True, enable_gqa=True))
        ),
        "sizes_differ": given(
            lambda x, q, k, v: joined(sdpa(q[..., :1], k[..., :1], v, is_causal=True))
        ),
        "longer_keys": given(
            lambda x, q, k, v: joined(
                sdpa(q, torch.cat([k, k], 2), torch.cat([v, v], 2), is_causal=True)
            )
        ),
        "shorter_keys": given(
            lambda x, q, k, v: joined(sdpa(q, k[:, :, :-1], v[:, :, :-1], is_causal=True))
        ),
        "keys_of_a_table": given(
            lambda x, q, k, v: joined(sdpa(q, fixed(), fixed(), is_causal=True))
        ),
        "queries_of_a_table": given(
            lambda x, q, k, v: joined(sdpa(fixed(), k, v, is_causal=True)).mean(1, keepdim=True)
        ),
        "no_keys": given(lambda x, q, k, v: joined(sdpa(q, k[:, :, :0], v[:, :, :0]))),
        "five_dimensions": lambda x, i: joined(sdpa(*(y[:, None] for y in qkv(x)), is_causal=True))[
            :, 0
        ],
        "five_with_a_mask": lambda x, i: joined(
            sdpa(*(y.unflatten(1, (2, 2)) for y in qkv(x)), _both(i)[:, None]).flatten(1, 2)
        ),
        "queries_of_fewer_dimensions": given(
            lambda x, q, k, v: sdpa(W[:, :2], k, v).mean((1, 2)).repeat(1, 4)[:, None]
        ),
        "keys_of_fewer_dimensions": given(
            lambda x, q, k, v: joined(sdpa(q, k[0], v[0], is_causal=True))
        ),
        "tail": lambda x, i: _rest(x, joined(sdpa(*qkv(x[:, 1:]), is_causal=True))),
        "tail_with_a_mask": lambda x, i: _rest(
            x, joined(sdpa(*qkv(x[:, 1:]), (_triangle(i[:, 1:]) & _both(i[:, 1:]))))
        ),
        "tail_of_queries": given(
            lambda x, q, k, v: _rest(x, joined(sdpa(q[:, :, 1:], k, v, is_causal=True)))
        ),
        "tail_of_keys": given(
            lambda x, q, k, v: _rest(
                x, joined(sdpa(q[:, :, :-1], k[:, :, 1:], v[:, :, 1:], is_causal=True))
            )
        ),
        "scale": given(lambda x, q, k, v: joined(sdpa(q, k, v, scale=0.3, is_causal=True))),
        "module": lambda x, i: MHA(x, x, x, need_weights=False)[0],
        "module_weights": lambda x, i: MHA(x, x, x)[0],
        "module_causal": lambda x, i: MHA(
            x, x, x, attn_mask=~_triangle(i), is_causal=True, need_weights=False
        )[0],
    }


ALL = MASKED | (CAUSAL if _both_at_once() else {}) | shapes()
GROUPS = [list(ALL)[i::8] for i in range(8)]


@pytest.mark.parametrize("at", in_parts(GROUPS))
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_every_spelling_is_exact(at: int) -> None:
    check(ALL, GROUPS[at], more=MORE)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(sorted(ALL)), min_size=1, max_size=3, unique=True),
    st.sampled_from((1, 3, 5, 12, 20)),
)
def test_many_spellings(names: list[str], chunk: int) -> None:
    check(ALL, names, (13, 7), chunk, more=MORE)


@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_dropout_on_rows_that_see_no_key_is_finite() -> None:
    """With a rate so small that no weight is dropped, the written-out form is plain attention."""
    names = ("both", "queries", "none", "learned_padded")
    cases = {n: masked(n, p=1e-12) for n in names}
    plain = {n: masked(n) for n in names}
    torch.manual_seed(0)
    check({n: _switch(cases[n], plain[n]) for n in names}, names, more=MORE)


def _switch(streamed: Case, plain: Case) -> Case:
    return lambda x, ids: (streamed if torch.compiler.is_compiling() else plain)(x, ids)


class Encoder(nn.Module):
    """torch's own layers: attention stands inside a function that is one operator of the graph."""

    def __init__(self, dropout: float, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, D), nn.Linear(D, 11)
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, causal: bool = True) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]) if causal else None
        padded = None if causal else ids == PAD
        x = self.layers(self.embed(ids), mask, padded, is_causal=causal)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_torchs_own_layers_streams(causal: bool) -> None:
    torch.manual_seed(0)
    plain = Encoder(0.0, norm_first=causal)
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=5, loss_chunk=4))
    streamed = fxmem.transform(copy.deepcopy(plain), plan)
    for length in (13, 9):
        ids = torch.arange(2 * length).reshape(2, length) % 11
        for net in (streamed, plain):
            net.zero_grad()
            net(ids, causal).backward()
        for p, q in zip(streamed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    report = fxmem.explain(streamed)
    assert not report.barriers and not report.pieces


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 4, 3, 8), (1, 4, 3, 8), (1, 4, 3, 8)),
        ((2, 4, 3, 8), (2, 3, 3, 8), (2, 3, 3, 8)),
        ((2, 4, 3, 8), (2, 4, 3, 4), (2, 4, 3, 8)),
        ((2, 4, 3, 8), (2, 4, 3, 8), (2, 4, 2, 8)),
    ],
)
def test_the_kernel_reads_nothing_beyond_its_operands(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    operands = [torch.randn(s) for s in (q, k, v)]
    with pytest.raises(VerificationError, match="shapes"):
        kernel.forward(*operands, (kernel.Span(0, 3),), 1.0)
    out, lse = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3)
    dk, dv = (torch.zeros_like(x) for x in operands[1:])
    with pytest.raises(VerificationError, match="shapes"):
        kernel.backward(out, *operands, out, lse, dk, dv, (kernel.Span(0, 3),), 1.0)
