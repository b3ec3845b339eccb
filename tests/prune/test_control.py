"""The linear control variate: unbiased by enumeration, fitted where there is enough to fit to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prune_toy import BASE, HALF, N, Toy, make, run
from test_estimator import LAYERS, MASKS, close, expected, probability, setting, slope

from fxmem.prune.search import estimator as est
from fxmem.prune.search.control_variate import History, fit


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["full", "layer", "none"])
def test_what_is_taken_from_the_losses_comes_back(scope: str, alpha: float) -> None:
    loss, s, s0 = setting()
    block = est.scope_blocks(LAYERS, scope)
    w = torch.linspace(-2, 3, len(s), dtype=torch.float64)
    rest = loss - (MASKS.double() - s0) @ w
    found = expected(rest, 0.4, s, s0, block, alpha=alpha) + w * est.variance(s) ** alpha
    close(found, expected(loss, 0.4, s, s0, block, alpha=alpha))


def test_it_takes_the_noise_of_a_linear_loss_away() -> None:
    _, s, _ = setting()
    w = torch.linspace(-2, 3, len(s), dtype=torch.float64)
    loss = MASKS.double() @ w
    close(loss - MASKS.double() @ w, torch.zeros_like(loss))
    close(slope(loss, s), w)


def test_fit_finds_a_linear_loss_under_batch_and_pair_effects() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(40, generator=g, dtype=torch.float64)
    masks = torch.rand(400, 40, generator=g) < 0.5
    step = torch.arange(400) // 8
    pairs = 0.2 * (masks[:, 0] ^ masks[:, 1]).double()
    losses = masks.double() @ w + 5 * step.double() + pairs
    found = fit(masks, losses, step)
    assert float((found - w).abs().max()) < 0.1
    noise = torch.randn(400, generator=g, dtype=torch.float64)
    assert float(fit(masks, noise, step).abs().max()) < 0.1


def test_history_is_limited_and_needs_pairs() -> None:
    history = History(3, rows=5)
    assert float(history.fit().abs().max()) == 0
    history.add(torch.eye(3, dtype=torch.bool)[:1], torch.ones(1, dtype=torch.float64), 0)
    assert float(history.fit().abs().max()) == 0
    for step in range(1, 4):
        history.add(torch.eye(3, dtype=torch.bool), torch.arange(3).double(), step)
    assert len(history.losses) == 5 and history.snapshot.tolist() == [2, 2, 3, 3, 3]


def test_a_mask_of_many_batches_is_one_row() -> None:
    history, masks = History(3, rows=9), torch.eye(3, dtype=torch.bool)
    alive = torch.tensor([True, True, True])
    history.note(torch.tensor([1.0, 2.0, 6.0]).double(), alive)
    history.note(torch.tensor([13.0, 11.0]).double(), torch.tensor([True, True, False]))
    assert len(history.losses) == 0
    history.close(masks, 7)
    assert history.losses.tolist() == [-0.5, -1.0, 3.0]
    assert history.snapshot.tolist() == [7, 7, 7] and torch.equal(history.masks, masks)
    history.close(masks, 8)
    assert len(history.losses) == 3


def test_slopes_come_from_earlier_snapshots_only() -> None:
    loop = make(replace(BASE, age=4, ess=0.0, samples=8, history=99))
    for step in range(12):
        loop.step()
        if step < 4:
            assert float(loop.slopes.abs().max()) == 0
        elif step % 4 == 0:
            rows = loop.history
            assert int(rows.snapshot.max()) == step // 4 - 1
            again = fit(rows.masks, rows.losses, rows.snapshot)
            assert torch.equal(loop.slopes, again)


def test_it_lessens_the_error_of_the_steps() -> None:
    """At a point that stands still, over many snapshots, against the enumerated slopes."""
    toy, errors = Toy(), {}
    cube = torch.tensor([[bool(i >> j & 1) for j in range(N)] for i in range(2**N)])
    loss = torch.tensor([toy(mask)(0) for mask in cube], dtype=torch.float64)
    p = probability(cube, HALF)
    exact = torch.stack([2 * (p * loss * (2.0 * cube[:, i] - 1)).sum() for i in range(N)])
    for rows in (0, 256):
        options = replace(BASE, age=1, samples=8, steps=60, lr=1e-9, history=rows)
        loop = make(options, toy)
        run(loop, 40)
        total = 0.0
        for _ in range(20):
            before = loop.s.clone()
            loop.options = replace(options, lr=1e-3, trust_cap=9.0)
            loop.budget = 1e9
            loop.step()
            step = (before - loop.s) / 1e-3 * 2  # lr and h^alpha at one half
            total += float((step - exact).square().sum())
            loop.s = before
        errors[rows] = total
    assert errors[256] < 0.5 * errors[0]
