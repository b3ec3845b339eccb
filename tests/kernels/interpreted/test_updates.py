"""Weight gradients, in-place updates and AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_near, rand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxmem.kernels import adamw, stochastic, weight_grad
from fxmem.kernels._triton import Config, config

SLOW = {"suppress_health_check": [HealthCheck.too_slow]}
SMALL = config(4, 1, O=16, I=16, N=16)
SIZES = (st.integers(1, 40), st.integers(1, 35), st.integers(1, 35))
DTYPES = st.sampled_from((torch.float32, torch.float16))


@settings(max_examples=10, **SLOW)
@given(*SIZES, DTYPES)
def test_weight_grad_adds_over_chunks(n: int, o: int, i: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    dy, x, acc = rand(n, o, dtype=dtype), rand(n, i, dtype=dtype), torch.randn(o, i)
    want = acc.double() + 0.5 * dy.double().t() @ x.double()
    for lo in range(0, n, 13):
        part = (dy[lo : lo + 13], x[lo : lo + 13])
        weight_grad.launcher(acc, *part, scale=0.5, config=SMALL)
    assert acc.dtype == torch.float32
    assert_near(acc, want, torch.float32)


@pytest.mark.parametrize("chosen", weight_grad.CONFIGS, ids=str)
def test_every_configuration(chosen: Config) -> None:
    dy, x, acc = torch.randn(70, 130), torch.randn(70, 140), torch.zeros(130, 140)
    weight_grad.launcher(acc, dy, x, config=chosen)
    assert_near(acc, dy.double().t() @ x.double(), torch.float32)


@settings(max_examples=10, **SLOW)
@given(*SIZES, st.sampled_from(("sgd", "sign")), st.booleans())
def test_update_of_float32_weights(n: int, o: int, i: int, rule: str, summed: bool) -> None:
    torch.manual_seed(7)
    dy, x, weight = torch.randn(n, o), torch.randn(n, i), torch.randn(o, i)
    acc = torch.randn(o, i) if summed else None
    grad = dy.double().t() @ x.double() + (0 if acc is None else acc.double())
    grad = grad.sign() if rule == "sign" else grad
    want = weight.double() - 0.1 * (0.01 * weight.double() + grad)
    given: dict[str, Any] = {"lr": 0.1, "decay": 0.01, "rule": rule}
    other = weight_grad.reference_update(weight.clone(), dy, x, acc, **given)
    weight_grad.launcher_update(weight, dy, x, acc, config=SMALL, **given)
    assert_near(weight, want, torch.float32)
    assert_near(other, want, torch.float32)


def test_sign_leaves_entries_without_gradient_alone() -> None:
    weight, dy, x = torch.randn(5, 6), torch.zeros(3, 5), torch.randn(3, 6)
    before = weight.clone()
    weight_grad.launcher_update(weight, dy, x, lr=0.1, rule="sign", config=SMALL)
    assert torch.equal(weight, before)


def exact_operands(n: int, o: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers over 64: their sums of products are exact in float32, in any order."""
    return torch.randint(-4, 5, (n, o)) / 64.0, torch.randint(-4, 5, (n, i)) / 64.0


def test_bfloat16_update_rounds_as_the_reference_bit_for_bit() -> None:
    dy, x = exact_operands(20, 33, 40)
    weight = torch.randn(33, 40).bfloat16()
    given: dict[str, Any] = {"lr": 2.0**-9, "key": stochastic.key(1, 2, 3), "first": 2**33 + 5}
    want = weight_grad.reference_update(weight.clone(), dy, x, **given)
    weight_grad.launcher_update(weight, dy, x, config=SMALL, **given)
    assert torch.equal(weight, want)


def test_bfloat16_update_does_not_depend_on_chunks_blocks_or_shards() -> None:
    dy, x = exact_operands(30, 24, 40)
    start = torch.randn(24, 40).bfloat16()
    given: dict[str, Any] = {"lr": 2.0**-8, "key": 77}
    whole = weight_grad.launcher_update(start.clone(), dy, x, config=SMALL, **given)
    other = config(4, 1, O=32, I=16, N=32)
    assert torch.equal(
        whole, weight_grad.launcher_update(start.clone(), dy, x, config=other, **given)
    )
    acc = weight_grad.launcher(torch.zeros(24, 40), dy[:11], x[:11], config=SMALL)
    chunked = weight_grad.launcher_update(
        start.clone(), dy[11:], x[11:], acc, config=SMALL, **given
    )
    assert torch.equal(whole, chunked)
    for rows, columns in ((slice(0, 10), slice(0, 40)), (slice(10, 24), slice(7, 40))):
        place = {"first": rows.start * 40 + columns.start, "pitch": 40}
        shard = start[rows, columns].clone()
        weight_grad.launcher_update(
            shard, dy[:, rows], x[:, columns], config=SMALL, **given, **place
        )
        assert torch.equal(shard, whole[rows, columns])


def test_bfloat16_update_keeps_infinity_and_nan() -> None:
    weight = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]]).bfloat16()
    weight_grad.launcher_update(weight, torch.zeros(1, 1), torch.zeros(1, 4), lr=1.0, config=SMALL)
    want = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]]).bfloat16()
    torch.testing.assert_close(weight, want, rtol=0, atol=0, equal_nan=True)


def test_tiny_updates_are_kept_on_average() -> None:
    """2^16 entries of 0.02, each moved by 1/20 of a unit in the last place, 20 times."""
    weight = torch.full((256, 256), 0.02).bfloat16()
    unit, before = 2.0**-13, weight.double().mean()
    dy, x = torch.ones(1, 256), torch.full((1, 256), unit / 20)
    for step in range(20):
        key = stochastic.key(0, 0, step)
        weight_grad.reference_update(weight, dy, x, lr=1.0, key=key)
    moved = float(before - weight.double().mean()) / unit
    assert abs(moved - 1) < 4 * (20 * 0.05 * 0.95 / 65536) ** 0.5


def test_keys_and_elements_give_different_bits() -> None:
    index = torch.arange(4096) * 2**20
    bits = stochastic.random_bits(index, 1)
    assert bits.unique().numel() > 4090
    assert float((bits == stochastic.random_bits(index, 2)).float().mean()) < 0.01
    assert abs(float((bits & 0xFFFF).float().mean()) / 65536 - 0.5) < 0.03
    assert len({stochastic.key(0, p, s) for p in range(30) for s in range(30)}) == 900


@settings(max_examples=10, **SLOW)
@given(st.integers(1, 70), DTYPES, st.sampled_from((None, torch.float32, torch.float16)))
def test_adamw_is_torchs(count: int, dtype: torch.dtype, copied: torch.dtype | None) -> None:
    torch.manual_seed(8)
    p = torch.nn.Parameter(torch.randn(count).double())
    given: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-6}
    theirs = torch.optim.AdamW([p], betas=(0.8, 0.9), **given)
    states = [[p.detach().float(), torch.zeros(count), torch.zeros(count)] for _ in range(2)]
    copies = [None if copied is None else torch.zeros(count, dtype=copied) for _ in range(2)]
    for step in range(1, 4):
        grad = rand(count, dtype=dtype)
        p.grad = grad.double()
        theirs.step()
        for run, (w, m, v), copy in zip(
            (adamw.launcher, adamw.reference), states, copies, strict=True
        ):
            run(w, grad, m, v, copy, step=step, beta1=0.8, beta2=0.9,
                config=Config(4, 1, {"BLOCK": 16}), **given)  # fmt: skip
    for (w, _, _), copy in zip(states, copies, strict=True):
        assert_near(w, p.detach(), torch.float32)
        if copy is not None:
            assert_near(copy, p.detach(), copy.dtype)


def test_adamw_copy_in_bfloat16() -> None:
    # The interpreter truncates where a GPU rounds to nearest: one unit in the last place.
    w, half = torch.randn(20), torch.zeros(20).bfloat16()
    adamw.launcher(w, torch.randn(20), torch.zeros(20), torch.zeros(20), half, step=1, lr=0.1)
    assert_near(half, w, torch.bfloat16)


def test_adamw_of_strided_tensors_is_the_references() -> None:
    given: dict[str, Any] = {"step": 1, "lr": 0.1}
    grad, start = torch.randn(10), torch.randn(20)
    got, want = ([start.clone()[::2], torch.zeros(10), torch.zeros(10)] for _ in range(2))
    adamw.launcher(got[0], grad, *got[1:], **given)
    adamw.reference(want[0], grad, *want[1:], **given)
    assert all(map(torch.equal, got, want))
