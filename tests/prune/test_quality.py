"""What the search finds, against planted and enumerated optima."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prune_oracle import Divergence, every_choice, layer_groups, llama, plant

from fxmem.prune.search import estimator as est
from fxmem.prune.search.session import run
from fxmem.prune.units.settings import ScoreSettings

PLAIN = ScoreSettings(
    init="uniform", alpha=0.5, metric="euclidean", history=0, standardise=False, widen=1.0,
    steps=300
)  # fmt: skip
PLANTED = replace(
    PLAIN, block=8, order="index", ranking="kind", decay="none", samples=16, age=1, lr=0.05,
    epsilon=0.01,
)  # fmt: skip
# Cut losses would hide units of small effect, and so would large ones that keep flipping.
SINGLE = ScoreSettings(
    init="uniform", block=1, order="index", ranking="kind", decay="none", samples=32, age=1,
    widen=1.0, steps=3000, lr=0.025, epsilon=0.001, outlier=float("inf"), history=8_000,
)  # fmt: skip
SMALL = replace(PLAIN, cost="units", samples=8, age=2, lr=0.1, epsilon=0.02)


@pytest.mark.parametrize(
    ("blocks", "options", "seed"),
    [
        pytest.param(9, PLANTED, 0, id="blocks-0"),
        *(
            pytest.param(blocks, options, seed, id=f"{name}-{seed}", marks=pytest.mark.slow)
            for name, blocks, options in (("blocks", 9, PLANTED), ("channels", 72, SINGLE))
            for seed in (0, 1, 2) if (blocks, seed) != (9, 0)
        ),
    ],
)  # fmt: skip
def test_planted_units_are_found_from_a_uniform_start(
    blocks: int, options: ScoreSettings, seed: int
) -> None:
    model = llama(seed, heads=(10, 5), channels=72)
    groups = layer_groups(model)
    live = plant(model, groups, blocks=blocks, seed=seed)
    found = run(model, groups, Divergence(model, groups, 1).instantiate, [None], options)
    right = sum(int((found.bools[name] & kept).sum()) for name, kept in live.items())
    every = sum(int(kept.sum()) for kept in live.values())
    assert right >= 0.99 * every
    # The budget leaves no room for dead ones: half of each kind is alive.
    assert sum(int(x.sum()) for x in found.bools.values()) <= every


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_search_is_in_the_best_percent_of_all_masks(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(seed, heads=(4, 4), channels=4)
    groups = layer_groups(model)
    oracle = Divergence(model, groups, seed + 1)
    choices = every_choice(16, 8)
    assert len(choices) == 12870
    values = torch.cat([oracle(part) for part in choices.split(715)])
    rows = []
    setups = {
        "re-weighted": SMALL,
        "stale": replace(SMALL, scope="none"),
        "fresh": replace(SMALL, age=1),
    }
    for name, options in setups.items() if seed else [("re-weighted", SMALL)]:
        found = run(model, groups, oracle.instantiate, [None], options)
        mask = torch.cat([found.bools[group.name] for group in groups])
        assert int(mask.sum()) == 8
        mine = float(oracle(mask[None]))
        better = int((values < mine - 1e-9).sum())
        regret = (mine - float(values.min())) / float(values.mean() - values.min())
        rows.append((name, found.counts.instantiations, regret, better))
    with capsys.disabled():
        for row in rows:
            print(f"\n  seed {seed} {row[0]}: {row[1]} snapshots, regret {row[2]:.3f}", end="")
            print(f", {row[3]} of {len(values)} masks are better", end="")
    assert rows[0][3] < len(choices) // 100


def test_gradient_on_a_model_is_the_enumerated_derivative() -> None:
    """One layer's 2^8 masks weighted by their probability: nothing is sampled."""
    model = llama(3, heads=(4, 4), channels=4)
    groups = layer_groups(model)
    oracle = Divergence(model, groups, 2)
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 1
    losses = oracle(torch.cat([torch.ones(256, 8, dtype=torch.bool), bits], 1))
    s0 = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 + 0.2
    s = (s0 + torch.linspace(-0.1, 0.1, 8, dtype=torch.float64)).clamp(0.05, 0.95)
    weight = torch.where(bits, s0, 1 - s0).prod(1)
    block = torch.zeros(8, dtype=torch.int64)
    total = torch.zeros(8, dtype=torch.float64)
    for mask, loss, p in zip(bits, losses, weight, strict=True):
        total += p * est.gradient(mask[None], loss[None], losses.mean(), s, s0, block)
    chance = torch.where(bits, s, 1 - s)
    for i in range(8):
        rest = chance[:, [j for j in range(8) if j != i]].prod(1)
        with_it, without = bits[:, i], ~bits[:, i]
        expected = (rest * losses)[with_it].sum() - (rest * losses)[without].sum()
        assert abs(float(total[i] - expected)) < 1e-12
