"""The search loop on abstract losses: refreshes, tables, failures, resuming, ranks."""

from __future__ import annotations

import itertools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from prune_options import scored
from prune_toy import BASE, COST, HALF, LAYER, N, Toy, drawn, make, run, run_rank, sparse_step
from torch import Tensor

from fxmem.errors import BudgetError, PlanError
from fxmem.prune.search import estimator as est
from fxmem.prune.search.draw_masks import draw
from fxmem.prune.search.loop import Loop
from fxmem.prune.search.projection import project, top
from fxmem.prune.search.snapshot import Alone
from fxmem.prune.units.options import Prune


@pytest.mark.parametrize("scope", ["full", "layer", "none"])
def test_search_finds_a_good_mask(scope: str) -> None:
    toy = Toy()
    loop = make(replace(BASE, scope=scope, steps=200), toy)
    found = toy.exact(top(run(loop), COST, N / 2))
    every = sorted(
        toy.exact(torch.zeros(N, dtype=torch.bool).index_fill(0, torch.tensor(pick), True))
        for pick in itertools.combinations(range(N), N // 2)
    )
    assert found <= every[len(every) // 50]


def test_instantiations_are_one_and_the_refreshes() -> None:
    toy = Toy()
    options = replace(BASE, age=5, lr=0.3, trust_cap=2.0, resident="all")
    loop, refreshes = make(options, toy), 0
    for _ in range(options.steps):
        worn = loop.snapshot is not None and (
            loop.age == options.age
            or est.effective_fraction(loop.s, drawn(loop).s0, loop.block) < options.ess
        )
        refreshes += bool(worn)
        loop.step()
    assert loop.counts.instantiations == 1 + refreshes
    assert toy.built == loop.counts.submodels == options.samples * (1 + refreshes)
    assert refreshes > options.steps // options.age, "no refresh came from the ESS"
    assert loop.counts.ess and min(loop.counts.ess) < options.ess


def test_age_one_is_plain_policy_gradient() -> None:
    toy, options = Toy(), replace(BASE, age=1)
    loop = make(options, toy)
    s = loop.s.clone()
    for t in range(options.steps):
        masks = torch.stack([draw(s, 0, t, k) for k in range(4)])
        losses = torch.tensor([toy(m)(t % 7) for m in masks], dtype=torch.float64)
        score = (masks.double() - s) * est.variance(s) ** -0.5
        grad = ((losses - est.leave_one_out(losses))[:, None] * score).mean(0)
        loop.step()
        delta = project(s - 0.05 * grad, COST, N / 2, 0.02) - s
        s = s + est.trust(delta, s, loop.block, options.trust_cap) * delta
        torch.testing.assert_close(loop.s, s, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("age", [1, 4])
def test_table_equals_live_bit_for_bit(age: int) -> None:
    one, every = (make(replace(BASE, age=age, resident=r)) for r in ("one", "all"))
    assert torch.equal(run(one), run(every))
    assert one.counts.used == every.counts.used == every.counts.forwards <= one.counts.forwards


class Faulty(Toy):
    """One mask number never gives a finite loss, or none does."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def __call__(self, mask: Tensor) -> Any:
        number, inner = self.built % 4, super().__call__(mask)
        return (lambda batch: math.nan) if number in self.bad else inner


def test_a_lost_loss_equals_one_sample_less() -> None:
    loop = make(replace(BASE, age=1, steps=1), Faulty({3}))
    loop.step()
    less = make(replace(BASE, age=1, steps=1, samples=3), Toy())
    less.step()
    assert torch.equal(loop.s, less.s)
    assert not torch.equal(loop.s, drawn(loop).s0)


def test_without_finite_losses_nothing_moves() -> None:
    loop = make(BASE, Faulty({0, 1, 2, 3}))
    before = loop.s.clone()
    run(loop)
    assert torch.equal(loop.s, before)
    assert loop.counts.skipped == BASE.steps


def test_single_samples_use_the_average_of_the_past() -> None:
    loop = make(replace(BASE, samples=1, age=2))
    loop.step()
    assert loop.counts.skipped == 1 and torch.equal(loop.s, drawn(loop).s0)
    loop.step()
    assert not torch.equal(loop.s, drawn(loop).s0)


@pytest.mark.parametrize(("epsilon", "returns"), [(0.02, True), (0.0, False)])
def test_only_a_clamped_unit_returns(epsilon: float, returns: bool) -> None:
    class Useful:
        def __call__(self, mask: Tensor) -> Any:
            value = 3.0 * (not bool(mask[0])) + float(mask[1:].sum()) * 0.05
            return lambda batch: value

    start = HALF.clone()
    start[0] = 0.0
    options = replace(BASE, epsilon=epsilon, steps=300, age=2, samples=8)
    loop = make(options, Useful(), start)
    run(loop)
    assert float(loop.s[0]) > 0.5 if returns else float(loop.s[0]) == 0.0


@pytest.mark.parametrize("resident", ["one", "all"])
@pytest.mark.parametrize("stop", [3, 10])
def test_resuming_changes_nothing(resident: str, stop: int) -> None:
    options = replace(BASE, resident=resident, history=20)
    whole, first = make(options), make(options)
    run(whole)
    run(first, stop)
    second = make(options)
    second.load(first.state())
    run(second, options.steps - stop)
    assert torch.equal(second.s, whole.s)
    with pytest.raises(BudgetError, match="checkpoint"):
        make(replace(options, lr=0.01)).load(first.state())


def test_two_ranks_equal_one_process(tmp_path: Any) -> None:
    mp.spawn(run_rank, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for resident in ("one", "all"):
        alone = run(make(replace(BASE, resident=resident)))
        for rank in (0, 1):
            got = torch.load(tmp_path / f"{resident}{rank}.pt")
            assert torch.equal(got, alone)
    dense = sparse_step(Alone())
    for rank in (0, 1):
        got = torch.load(tmp_path / f"weights{rank}.pt")
        for name in dense:
            torch.testing.assert_close(got[name], dense[name], rtol=1e-12, atol=1e-12)
        assert "differ" in torch.load(tmp_path / f"error{rank}.pt")


def test_sparse_step_equals_masked_dense_gradients() -> None:
    found = sparse_step(Alone())
    torch.manual_seed(0)
    up, down = torch.randn(N, 3, dtype=torch.float64), torch.randn(2, N, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    masks = torch.stack([draw(HALF, 0, 0, k) for k in range(4)])
    ratio = (0.8 + 0.4 * masks.double()).prod(1)
    a, b = up.requires_grad_(), down.requires_grad_()
    total = sum(
        r * (torch.tanh(x @ a.T) * m @ b.T).square().mean() / 4
        for r, m in zip(ratio, masks, strict=True)
    )
    grads = torch.autograd.grad(total, (a, b))
    for name, grad in zip(("up", "down"), grads, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)
    never = ~masks.any(0)
    assert bool((found["up"][never] == 0).all())


class Beside:
    """One rank of several that run as threads of this process."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self.slots, self.barrier = rank, len(slots), slots, barrier

    def losses(self, local: Tensor) -> Tensor:
        """Row k is the row k // world of rank k % world."""
        return torch.stack(self._shared(local), 1).flatten(0, 1)

    def agree(self, s: Tensor) -> None:
        assert all(torch.equal(other, s) for other in self._shared(s))

    def _shared(self, mine: Tensor) -> list[Tensor]:
        self.slots[self.rank] = mine
        self.barrier.wait()
        everyone = list(self.slots)
        # Nobody writes the next round's value before all have read this one's.
        self.barrier.wait()
        return everyone


@pytest.mark.parametrize("resident", ["one", "all"])
@pytest.mark.parametrize("world", [2, 4])
def test_masks_and_probabilities_are_the_same_for_every_world_size(
    world: int, resident: str
) -> None:
    options = replace(BASE, resident=resident)

    def rank(number: int, slots: list[Any], barrier: threading.Barrier) -> list[Tensor]:
        loop = make(options, exchange=Beside(number, slots, barrier))
        seen = []
        try:
            for _ in range(options.steps):
                loop.step()
                seen += [drawn(loop).masks.clone(), loop.s.clone()]
        except BaseException:
            barrier.abort()
            raise
        return seen

    slots: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=60)
    with ThreadPoolExecutor(world) as pool:
        every = list(pool.map(lambda k: rank(k, slots, barrier), range(world)))
    alone = make(options)
    for t in range(options.steps):
        alone.step()
        for seen in every:
            assert torch.equal(seen[2 * t], drawn(alone).masks)
            assert float((seen[2 * t + 1] - alone.s).abs().max()) <= 1e-12
    assert alone.counts.instantiations > 1


def test_masks_follow_from_seed_snapshot_and_sample() -> None:
    masks = [
        draw(HALF, seed, snapshot, k) for seed in (0, 1) for snapshot in (0, 1) for k in (0, 1)
    ]
    assert len(torch.unique(torch.stack(masks), dim=0)) == len(masks)
    torch.manual_seed(123)  # The global generator has no say.
    assert torch.equal(draw(HALF, 0, 0, 1), masks[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep", 0), ("keep", 1.1), ("alpha", 0.4), ("clip", 0.5), ("scope", "all"), ("steps", -1),
     ("kinds", "heads"), ("block", True), ("unknown", 1), ("estimator", "guess")],
)  # fmt: skip
def test_impossible_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(PlanError, match=field):
        scored(**{field: value})


def test_options_survive_plain_values() -> None:
    for options in (Prune(keep=0.3, kinds=("a", "b")), scored(keep=0.3, samples=2, clip=3.0)):
        again = Prune.from_dict(json.loads(json.dumps(options.to_dict())))
        assert again == options and hash(again) == hash(options)
        assert again.settings() == options.settings()


def test_options_of_the_first_version_warn_and_work() -> None:
    with pytest.warns(DeprecationWarning, match="samples=..., clip"):
        old = Prune(keep=0.3, clip=3.0, samples=2)
    assert old == scored(keep=0.3, samples=2, clip=3.0, steps=200, init="wanda")


def test_searches_that_cannot_work_are_refused() -> None:
    with pytest.raises(BudgetError, match="epsilon"):
        Loop(HALF, COST, LAYER, 0.1, BASE, Toy(), [0])
    with pytest.raises(BudgetError, match="batches"):
        Loop(HALF, COST, LAYER, 6, BASE, Toy(), [])
