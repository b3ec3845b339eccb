"""The search by gates: budgets, kinds of units and models, resuming, ranks, quality."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prune_cases import build, coupled
from prune_oracle import Divergence, every_choice, layer_groups, llama
from torch import Tensor

import fxmem
from fxmem.errors import BudgetError, ModifiedParameterError, PlanError
from fxmem.prune.search.gate_loop import GateLoop
from fxmem.prune.search.session import Step, run
from fxmem.prune.search.space import Space
from fxmem.prune.shrink.gated_submodel import GatedSubmodel
from fxmem.prune.units.settings import GateSettings


def data(count: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 97, (2, 11), generator=g) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


class Bowl:
    """A loss with pair terms, without a network; what a sub-model lacks has no derivative."""

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.a = torch.randn(n, generator=g, dtype=torch.float64).abs()
        q = torch.randn(n, n, generator=g, dtype=torch.float64) / n
        self.q = q @ q.T
        self.built: list[Tensor] = []

    def __call__(self, held: Tensor) -> Any:
        self.built.append(held)

        def derivatives(batch: float, mask: Tensor) -> tuple[float, Tensor]:
            assert not bool((mask & ~held).any())
            gone = 1 - mask.double()
            loss = float(gone @ self.a + 0.5 * gone @ self.q @ gone) * (1 + batch)
            return loss, -(self.a + self.q @ gone) * (1 + batch) * held

        return derivatives


class Units:
    """One group of single units."""

    def __init__(self, name: str, size: int, cost: int) -> None:
        self.name, self.kind, self.layer, self.size, self.cost = name, "mlp", 0, size, cost
        self.consumer = ()


def loop(bowl: Bowl, options: GateSettings, sizes: tuple[int, ...], **more: Any) -> GateLoop:
    groups = [Units(f"g{i}", size, 3 + 4 * i) for i, size in enumerate(sizes)]
    g = torch.Generator().manual_seed(7)
    noise = torch.exp(torch.randn(sum(sizes), generator=g, dtype=torch.float64))
    parts = (bowl.a * noise).split(list(sizes))
    values = {u.name: part for u, part in zip(groups, parts, strict=True)}
    space = Space.build(groups, options, values)
    gated = torch.ones(len(space.cost), dtype=torch.bool)
    exchange = more.pop("exchange", None)
    return GateLoop(space, values, options, bowl, [0.0, 0.1, -0.1], exchange, gated)


@settings(max_examples=25, deadline=None)
@example(keep=0.5, widen=1.03125, seed=30, round_to=1)
@given(
    keep=st.floats(0.1, 1.0), widen=st.floats(1.0, 2.0), seed=st.integers(0, 99),
    round_to=st.sampled_from([1, 2, 5]),
)  # fmt: skip
def test_the_budget_is_met_and_filled(keep: float, widen: float, seed: int, round_to: int) -> None:
    options = GateSettings(keep=keep, steps=6, round_to=round_to, widen=widen)
    bowl = Bowl(150, seed)
    search = loop(bowl, options, (80, 70))
    for _ in range(6):
        search.step()
        for mask, part in ((search.final(), keep), (bowl.built[-1], min(1, keep * widen))):
            spent, whole = float(search.space.cost @ mask.double()), search.space.budget_base
            assert spent <= part * whole * (1 + 1e-12)
            assert spent > part * whole - 7 * 2 * round_to
    assert all(int(mask.sum()) > 0 for mask in bowl.built)


@pytest.mark.parametrize("widen", [1.3, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_moves_to_a_better_mask_than_the_start(seed: int, widen: float) -> None:
    bowl = Bowl(60, seed)
    search = loop(bowl, GateSettings(keep=0.5, steps=200, widen=widen), (30, 30))

    def loss(mask: Tensor) -> float:
        return float(bowl(mask)(0.0, mask)[0])

    begin = loss(search.final())
    for _ in range(200):
        search.step()
    alone = loss(search.space.final(bowl.a / search.space.cost, search.options))
    # a sub-model that lacks good units needs long to hear of them
    assert loss(search.final()) < begin
    assert widen < 2 or loss(search.final()) <= alone * 1.03


def test_sub_models_are_few_and_rebuilt_where_the_mask_leaves_them() -> None:
    narrow = loop(Bowl(60, 0), GateSettings(keep=0.4, steps=30, lr=1.0, widen=1.2), (30, 30))
    wide = loop(Bowl(60, 0), GateSettings(keep=0.4, steps=30, lr=1.0, widen=2.5), (30, 30))
    for _ in range(30):
        narrow.step()
        wide.step()
    assert wide.counts.instantiations == 1 < narrow.counts.instantiations < 30
    assert narrow.counts.forwards == wide.counts.forwards == 30


@pytest.mark.parametrize("what", ["loss", "derivative"])
def test_a_step_that_is_not_finite_moves_nothing(what: str) -> None:
    class Broken(Bowl):
        def __call__(self, held: Tensor) -> Any:
            right = super().__call__(held)

            def derivatives(batch: float, mask: Tensor) -> tuple[float, Tensor]:
                loss, slope = right(batch, mask)
                if what == "loss":
                    return float("nan"), slope
                return loss, torch.where(torch.arange(len(slope)) == 3, torch.inf, slope)

            return derivatives

    search = loop(Broken(60, 0), GateSettings(steps=3), (30, 30))
    before = search.s.clone()
    search.step()
    assert torch.equal(search.s, before) and search.counts.skipped == 1


def test_resumed_equals_uninterrupted() -> None:
    options = GateSettings(keep=0.4, steps=20, widen=1.1)
    whole, bowl = loop(Bowl(60, 3), options, (30, 30)), Bowl(60, 3)
    first = loop(bowl, options, (30, 30))
    for _ in range(20):
        whole.step()
    for _ in range(9):
        first.step()
    again = loop(bowl, options, (30, 30))
    again.load(first.state())
    for _ in range(11):
        again.step()
    assert torch.equal(again.s, whole.s)
    assert again.counts.instantiations == whole.counts.instantiations
    with pytest.raises(BudgetError, match="other options"):
        loop(bowl, GateSettings(keep=0.5, steps=20, widen=1.1), (30, 30)).load(first.state())


class Beside:
    """Ranks as threads."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self.slots, self.barrier = rank, len(slots), slots, barrier

    def losses(self, local: Tensor) -> Tensor:
        self.slots[self.rank] = local
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return torch.stack(everyone, 1).flatten(0, 1)

    def agree(self, s: Tensor) -> None:
        every = self.losses(s[None])
        assert all(torch.equal(row, s) for row in every)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_a_step(world: int) -> None:
    options = GateSettings(keep=0.4, steps=8, widen=1.1, batches=4)
    alone = loop(Bowl(60, 3), options, (30, 30))
    for _ in range(8):
        alone.step()
    slots: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=60)

    def rank(number: int) -> Tensor:
        search = loop(Bowl(60, 3), options, (30, 30), exchange=Beside(number, slots, barrier))
        for _ in range(8):
            search.step()
        return search.s

    with ThreadPoolExecutor(world) as pool:
        assert all(torch.equal(s, alone.s) for s in pool.map(rank, range(world)))
    odd = GateSettings(batches=3)
    with pytest.raises(BudgetError, match="ranks"):
        loop(Bowl(60, 3), odd, (30, 30), exchange=Beside(0, [None, None], barrier))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ()), ("gpt2", ()), ("llama_mha_tied", ("layers",)), ("llama", ("width",)),
        ("qwen3_moe", ()), ("qwen3_moe", ("experts", "kv_groups")),
        ("llama", ("attention_blocks", "mlp_channels")),
    ],
)  # fmt: skip
def test_kinds_of_models_and_units(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    model: Any = build(name).float()
    units = fxmem.coupling(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = fxmem.Prune(keep=0.7, kinds=kinds, steps=4, advanced={"init_batches": 2})
    seen: list[Step] = []
    masks = fxmem.search(model, data(), options, coupled=units, callback=seen.append)
    space = seen[-1].space
    kept = float(space.cost @ space.final(seen[-1].probabilities, options.settings()).double())
    assert 0.3 * space.budget_base < kept <= 0.7 * space.budget_base * (1 + 1e-12)
    assert masks == fxmem.Masks.from_bools(units, seen[-1].bools())
    assert bool(torch.isfinite(fxmem.materialize(model, masks, units)(**data()[0]).loss))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def stop(step: Step) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    file = tmp_path / "search.pt"
    with pytest.raises(KeyboardInterrupt):
        fxmem.search(model, data(), options, coupled=units, callback=stop, checkpoint=file)
    assert fxmem.search(model, data(), options, coupled=units, checkpoint=file) == masks


def test_inside_a_sub_model_the_derivatives_are_those_of_the_dense_gated_model() -> None:
    from fxmem.prune.shrink.gate_gradients import Gates

    model = build("gpt2")
    units = coupled("gpt2")
    groups = [g for g in units.groups if g.kind in ("kv_groups", "mlp_channels")]
    wide = {g.name: torch.arange(g.size) % 4 > 0 for g in groups}
    wide[groups[0].name] = torch.zeros_like(wide[groups[0].name])  # one stays that says nothing
    inside = {name: held & (torch.arange(len(held)) % 3 > 0) for name, held in wide.items()}
    submodel = GatedSubmodel(
        model, units, fxmem.Masks.from_bools(units, wide), [g.name for g in groups]
    )
    loss, found = submodel(data()[0], inside)
    with Gates(model, groups) as gates:
        want, slopes = gates(data()[0], inside)
    assert abs(loss - want) < 1e-10
    for name, held in wide.items():
        assert float((found[name] - slopes[name] * held).abs().max()) < 1e-10
    shared = {p.data_ptr() for p in model.parameters()}
    whole = [p for n, p in submodel.gates.model.named_parameters() if "ln_" in n]
    assert whole and all(p.data_ptr() in shared for p in whole)


def test_streamed_sub_models_give_the_same_masks() -> None:
    model = build("llama")
    units = coupled("llama")
    options = fxmem.Prune(keep=0.5, steps=3, advanced={"init_batches": 1})
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=4, loss_chunk=4))
    made: list[Any] = []

    def prepare(small: Any) -> Any:
        made.append(fxmem.transform(small, plan))
        return made[-1]

    streamed = fxmem.search(model, data(), options, coupled=units, prepare=prepare)
    assert made and streamed == fxmem.search(model, data(), options, coupled=units)
    assert "chunk" in str(fxmem.explain(made[0]))


def test_bad_requests_are_named() -> None:
    model: Any = build("llama")
    units = coupled("llama")
    nothing = [{"input_ids": data()[0]["input_ids"]}]
    with pytest.raises(PlanError, match="labels"):
        fxmem.search(model, nothing, coupled=units)
    with pytest.raises(PlanError, match="no option 'samples'"):
        fxmem.Prune(advanced={"samples": 3})
    with pytest.raises(PlanError, match="gates"):
        score = fxmem.Prune(estimator="score")
        fxmem.search(model, data(), score, coupled=units, prepare=fxmem.transform)

    def train(step: Step) -> None:
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)

    options = fxmem.Prune(keep=0.5, steps=8, advanced={"refresh": 0.0, "widen": 1.1, "lr": 2.0})
    with pytest.raises(ModifiedParameterError, match="changed during the search"):
        fxmem.search(model, data(), options, coupled=units, callback=train)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_few_of_all_masks_are_better(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all 12,870 masks of a small model, by the divergence from its own outputs."""
    model = llama(seed, heads=(4, 4), channels=4)
    groups = layer_groups(model)
    oracle = Divergence(model, groups, seed + 1)
    choices = every_choice(16, 8)
    values = torch.cat([oracle(part) for part in choices.split(715)])
    options = GateSettings(keep=0.5, steps=300, init="uniform", cost="units", widen=2.0)
    result = run(model, groups, oracle.gated, [None], options)
    found = torch.cat([result.bools[group.name] for group in groups])
    mine = float(oracle(found[None]))
    better = int((values < mine - 1e-9).sum())
    with capsys.disabled():
        print(f"\n  seed {seed}: {better} of {len(values)} masks are better", end="")
    assert int(found.sum()) == 8 and better < len(choices) // 100
