"""Losses far above the others': their ceilings, and that what is then minimised has no bias."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from prune_toy import BASE, Toy, make, run
from torch import Tensor

from fxmem.prune.search import estimator as est
from fxmem.prune.search.outliers import against_others, ceilings, robust_variance

N, K = 3, 3


def test_a_ceiling_does_not_know_its_own_loss() -> None:
    losses = torch.tensor([1.0, 2.0, 30.0, 3.0], dtype=torch.float64)
    found = ceilings(losses, 4.0)
    assert found.tolist() == [7.0, 7.0, 6.0, 6.0]
    losses[2] = 1e6
    assert float(ceilings(losses, 4.0)[2]) == 6.0


def test_nothing_is_cut_below_the_ceiling() -> None:
    losses = torch.tensor([1.0, 1.5, 2.0, 1.2], dtype=torch.float64)
    rest, baseline = against_others(losses, torch.zeros(4).double(), 9.0)
    assert torch.equal(rest, losses)
    torch.testing.assert_close(baseline, est.leave_one_out(losses))


def test_spread_ignores_one_outlier() -> None:
    losses = torch.tensor([1.0, 1.2, 0.8, 1.1, 0.9, 500.0], dtype=torch.float64)
    assert robust_variance(losses) < 0.1
    assert robust_variance(torch.ones(4).double()) == 0.0
    assert robust_variance(torch.tensor([1.0, 1.0, 1.0, 5.0]).double()) == pytest.approx(4.0)


def cube() -> Tensor:
    return torch.tensor([[bool(i >> j & 1) for j in range(N)] for i in range(2**N)])


def test_gradient_of_the_cut_loss_is_unbiased() -> None:
    """Over all draws of K masks: the mean estimate is the slope of the expected cut loss."""
    g = torch.Generator().manual_seed(0)
    masks, s = cube(), torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)
    table = torch.randn(2**N, generator=g, dtype=torch.float64).exp() * 3
    w = torch.randn(N, generator=g, dtype=torch.float64)
    weight = torch.where(masks, s, 1 - s).prod(1)
    block = est.scope_blocks(torch.zeros(N, dtype=torch.int64), "full")
    got = want = torch.zeros(N, dtype=torch.float64)
    cuts = 0
    for drawn in product(range(2**N), repeat=K):
        rows, losses = masks[list(drawn)], table[list(drawn)]
        known = (rows.double() - s) @ w
        rest, baseline = against_others(losses, known, 0.7)
        cuts += int((rest < losses - known).sum())
        p = float(weight[list(drawn)].prod())
        got = got + p * (est.gradient(rows, rest, baseline, s, s, block) + w)
        # The slope of E min(loss, c) for a ceiling c that the other masks of this draw set.
        for k in range(K):
            cut = torch.minimum(table, ceilings(losses, 0.7)[k])
            score = (masks.double() - s) / est.variance(s)
            want = want + p / K * (weight * cut) @ score
    assert cuts > 0
    assert float((got - want).abs().max()) < 1e-12


def test_one_bad_mask_moves_the_others_less() -> None:
    """A unit that the model cannot do without, rarely dropped: better masks of the rest."""

    class Vital(Toy):
        def __call__(self, mask: Tensor) -> Any:
            loss = super().__call__(mask)
            return lambda batch: loss(batch) + 1000.0 * (not bool(mask[0]))

    start = torch.full((12,), 0.5, dtype=torch.float64)
    start[0] = 0.9
    found = {}
    for outlier in (4.0, math.inf):
        losses = []
        for seed in range(6):
            options = replace(BASE, samples=8, outlier=outlier, steps=60, lr=0.1, seed=seed)
            loop = make(replace(options, standardise=True, age=1), Vital(seed), start)
            run(loop)
            assert (loop.counts.cut > 0) == math.isfinite(outlier)
            kept = torch.zeros(12, dtype=torch.bool)
            kept[loop.s.topk(6).indices] = True
            assert bool(kept[0])
            losses.append(Toy(seed).exact(kept))
        found[outlier] = sum(losses)
    assert found[4.0] < found[math.inf], found
