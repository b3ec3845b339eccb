"""Masks inside built sub-models: their law, what runs, and what a search gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from prune_cases import build, coupled
from prune_options import scored
from prune_toy import BASE, HALF, Toy, drawn, make, run
from torch import Tensor

import fxmem
from fxmem.prune.search.draw_masks import draw, nested, widened
from fxmem.prune.shrink.gates import UNGATED
from fxmem.prune.shrink.submodels import Instances

S = torch.tensor([0.0, 0.02, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)


def test_widened_odds() -> None:
    wide = widened(S, 3.0)
    assert wide[0] == 0 and wide[-1] == 1
    inner = slice(1, -1)
    torch.testing.assert_close(
        wide[inner] / (1 - wide[inner]), 3 * S[inner] / (1 - S[inner]), rtol=1e-12, atol=0
    )
    assert torch.equal(widened(S, 1.0), S)


def test_masks_lie_inside_and_have_the_wanted_law() -> None:
    wide, count = widened(S, 3.0), 400
    outer = torch.stack([draw(wide, 0, 0, k) for k in range(count)])
    total = torch.zeros(6, dtype=torch.float64)
    for step in range(10):
        masks, law = nested(wide, outer, S, 0, 0, step)
        assert torch.equal(law, S) and not bool((masks & ~outer).any())
        total += masks.double().mean(0)
    error = (total / 10 - S).abs()
    # Steps share the wide masks, so the spread is at most theirs.
    assert bool((error <= 4 * (S * (1 - S) / count).sqrt()).all())
    assert not torch.equal(masks, nested(wide, outer, S, 0, 0, 3)[0])


def test_a_unit_cannot_be_more_likely_than_in_the_wide_mask() -> None:
    wide = torch.full((2,), 0.4, dtype=torch.float64)
    masks = torch.tensor([[True, False]])
    inside, law = nested(wide, masks, torch.tensor([0.7, 0.2], dtype=torch.float64), 0, 0, 0)
    assert law.tolist() == [0.4, 0.2]
    assert bool(inside[0, 0])


@pytest.mark.parametrize("resident", ["one", "all"])
def test_units_without_gates_keep_their_built_mask(resident: Any) -> None:
    gated = torch.arange(12) % 2 == 0
    options = replace(BASE, widen=4.0, age=4, ess=0.0, resident=resident)
    loop = make(options, Gated(), gated=gated)
    for _ in range(8):
        loop.step()
        now = drawn(loop)
        masks, law = now.inside(loop.done - 1, loop.s)
        assert torch.equal(masks[:, ~gated], now.masks[:, ~gated])
        assert torch.equal(law[~gated], now.s0[~gated])
        assert torch.equal(now.wide[~gated], now.s0[~gated])
        assert bool((now.wide[gated] > now.s0[gated]).all())


class Gated(Toy):
    """Measures the mask inside, and checks that it lies in the built one."""

    def __call__(self, mask: Tensor) -> Any:
        self.built += 1

        def loss(batch: int, inside: Tensor) -> float:
            assert not bool((inside & ~mask).any())
            return self.exact(inside)

        return loss


@pytest.mark.parametrize("resident", ["one", "all"])
def test_fewer_builds_reach_what_new_masks_every_step_reach(resident: Any) -> None:
    """Regret over seeds: nested masks with 1/8 of the sub-models, against the same masks reused."""
    regret: dict[str, float] = {}
    built: dict[str, int] = {}
    ways = {"fresh": (1, 1.0), "nested": (8, 4.0), "reused": (8, 1.0)}
    for name, (age, widen) in ways.items():
        total = 0.0
        for seed in range(8):
            toy = Gated(seed) if widen > 1 else Toy(seed)
            options = replace(BASE, steps=96, lr=0.1, samples=4, ess=0.0, seed=seed, widen=widen)
            loop = make(replace(options, age=age, resident=resident), toy)
            run(loop)
            kept = torch.zeros(12, dtype=torch.bool)
            kept[loop.s.topk(6).indices] = True
            total += toy.exact(kept)
            built[name] = loop.counts.submodels
        regret[name] = total / 8
    print(regret, built)
    assert built["nested"] * 8 == built["fresh"]
    assert regret["nested"] < regret["reused"]


@pytest.mark.parametrize("resident", ["one", "all"])
def test_resuming_changes_nothing(resident: Any) -> None:
    options = replace(BASE, widen=4.0, resident=resident, history=20)
    whole, first = make(options, Gated()), make(options, Gated())
    run(whole)
    run(first, 10)
    second = make(options, Gated())
    second.load(first.state())
    run(second, options.steps - 10)
    assert torch.equal(second.s, whole.s) and not torch.equal(whole.s, HALF)


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "opt", "mixtral"))],
)
def test_gates_equal_the_masked_model(name: str) -> None:
    model = build(name)
    units = coupled(name)
    gated = [g for g in units.groups if g.kind not in UNGATED]
    outer = {g.name: torch.rand(g.size) < 0.7 for g in gated}
    inner = {n: b & (torch.rand(len(b)) < 0.6) for n, b in outer.items()}
    first = next(iter(inner))
    inner[first][:] = False
    masks = fxmem.Masks.from_bools(units, inner)
    small = Instances(model, units, compile=False)(fxmem.Masks.from_bools(units, outer))
    ids = torch.randint(3, 97, (2, 9))
    batch = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        with fxmem.masked(model, masks, units):
            want = model(**batch).logits
        whole = small(batch).logits
        got = small(batch, masks).logits
        assert (got - want).abs().max() < 1e-10
        assert (whole - want).abs().max() > 1e-3
        assert torch.equal(small(batch).logits, whole)  # the gates are open again
    for group in units.groups:
        if group.kind in UNGATED:
            fewer = fxmem.Masks.from_bools(
                units, inner | {group.name: torch.arange(group.size) > 0}
            )
            with pytest.raises(fxmem.MaskError, match=f"cannot remove units of {group.name}"):
                small(batch, fewer)


def test_search_with_nested_masks() -> None:
    model, units = build("llama"), coupled("llama")
    ids = torch.randint(3, 97, (4, 2, 11))
    batches = [{"input_ids": x, "labels": x} for x in ids]
    for resident in ("one", "all"):
        options = scored(
            keep=0.5, steps=6, age=3, widen=3.0, block=8, resident=resident, init="uniform"
        )
        masks = fxmem.search(model, batches, options, coupled=units)
        assert masks == fxmem.search(model, batches, options, coupled=units)
        assert 0.3 < masks.sparsity(units)["prunable"] < 0.7
