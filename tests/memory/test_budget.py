"""Stream(memory=..., offload=...): exact, within the budget, refused where it cannot be met."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxmem
from fxmem import Plan, Stream, api
from fxmem.compiler.step import CompiledGraph
from fxmem.memory import budget as budget_module
from fxmem.memory.budget import Budget, Option, _solve, needed
from fxmem.memory.predict import Step, predict, predict_whole
from fxmem.runtime import offload
from fxmem.runtime.retention import Kept

LAYERS = 4
Captured = tuple[nn.Module, dict[str, torch.Tensor]]


def streamed(net: nn.Module, **options: Any) -> nn.Module:
    return fxmem.transform(net, Plan(stream=Stream(**{"chunk": 150, "loss_chunk": 150, **options})))


def graph_of(net: nn.Module) -> CompiledGraph:
    return api._TRANSFORMED[net].graphs[-1]


def weights(net: nn.Module) -> int:
    return sum(p.nbytes for p in net.parameters())


def peak(net: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Of a step in float64 from fresh gradients, weights counted; programs are there before."""
    net.zero_grad()
    with everything_in_double():
        net(**inputs).loss.backward()
    net.zero_grad()
    with everything_in_double():
        return weights(net) + fxmem.measure.peak_bytes(lambda: net(**inputs).loss.backward())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.model(
        num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=160,
        max_position_embeddings=4096,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "padding"), [("llama", "left"), ("gemma3", "none")])
def test_every_level_is_exact_on_the_device_and_away(
    name: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    with everything_in_double():
        net = tiny.model(name).double()
        inputs = tiny.batch(2, 40, padding) if padding == "left" else tiny.batch(2, 40)
        loss, want = tiny.step(net, inputs)
        streamed(net, chunk=7, loss_chunk=5)
        tiny.step(net, inputs)
        graph = graph_of(net)
        count = len(graph.calls)
        sizes = []
        for level in (0, 1, 3):
            for away in (frozenset(), frozenset(range(count))):
                own = tuple(min(level, len(c.code.levels) - 1) for c in graph.calls)
                kept = Kept(own, away)
                monkeypatch.setattr(graph.holding, "to_run", lambda *_, kept=kept: kept)
                got_loss, got = tiny.step(net, inputs)
                assert largest_difference(got, want)[0] <= 1e-10
                assert abs(got_loss - loss) <= 1e-10 * abs(loss)
            sizes.append(len(graph.calls[1].code.level(level)))
        assert sizes == sorted(sizes) and sizes[0] == 0


@pytest.fixture(scope="module")
def captured(model: nn.Module) -> Captured:
    """A streamed model in float64 that has run, and its gradients in plain PyTorch."""
    with everything_in_double():
        net = copy.deepcopy(model).double()
        _, want = tiny.step(net, tiny.batch(1, 600))
        streamed(net)
        tiny.step(net, tiny.batch(1, 600))
    return net, want


def test_no_product_runs_twice_at_level_two(captured: Captured) -> None:
    code = graph_of(captured[0]).calls[1].code
    counts = [
        sum(
            "mm" in str(n.target)
            for loop in code.program(f"backward+{level}" if level else "backward").loops
            for n in loop.module.graph.nodes
        )
        for level in range(3)
    ]
    assert counts[2] == 14 < counts[0]  # two products per matrix, of seven matrices


def under(net: nn.Module, **options: Any) -> Budget:
    """From now on the model's calls keep to a budget, without another capture."""
    graph = graph_of(net)
    if isinstance(graph.holding, Budget):
        graph.holding = graph.holding.least
    graph.holding = Budget(graph, Stream(chunk=150, loss_chunk=150, **options))
    return graph.holding


def test_a_budget_is_kept_and_used(captured: Captured) -> None:
    net, want = captured
    least = weights(net) + predict(graph_of(net), {"T": 600}).peak_bytes
    levels = []
    for share in (1.2, 50.0):
        budget = under(net, memory=int(least * share) + 2**21)
        assert peak(net, tiny.batch(1, 600)) <= int(least * share) + 2**21
        got = {n: p.grad for n, p in net.named_parameters()}
        assert largest_difference(got, want)[0] <= 1e-10
        net.zero_grad()
        levels.append(budget.kept({"T": 600}).levels)
    assert sum(levels[0]) < sum(levels[1])
    assert set(levels[1][1:-1]) == {3}
    net.zero_grad()


@settings(max_examples=5)
@given(share=st.floats(0.8, 8.0), length=st.sampled_from([150, 333]), away=st.booleans())
def test_random_budgets(captured: Captured, share: float, length: int, away: bool) -> None:
    net = captured[0]
    net.zero_grad()
    least = weights(net) + Step(graph_of(net), {"T": length}, nothing(net)).predict().peak_bytes
    budget = int(share * least) + 2**21
    under(net, memory=budget, offload="disk" if away else "none")
    try:
        assert peak(net, tiny.batch(1, length)) <= budget
    except fxmem.MemoryBudgetError:
        assert share < 1.1
        assert all(p.grad is None for p in net.parameters())
    net.zero_grad()


def nothing(net: nn.Module) -> Kept:
    return Kept((0,) * len(graph_of(net).calls))


def test_a_budget_that_cannot_be_met(model: nn.Module) -> None:
    net = streamed(copy.deepcopy(model), memory="3MB")
    with pytest.raises(fxmem.MemoryBudgetError, match=r"600 tokens .* is 3 MB .*offload"):
        net(**tiny.batch(1, 600))
    assert all(p.grad is None for p in net.parameters())
    tiny.step(net, tiny.batch(1, 16))


def test_a_large_budget_runs_plain_autograd(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(graph: CompiledGraph, sizes: dict[str, int]) -> Any:
        asked.append(sizes["T"])
        return predict_whole(graph, sizes)

    monkeypatch.setattr(budget_module, "predict_whole", counted)
    with everything_in_double():
        net = copy.deepcopy(model).double()
        _, want = tiny.step(net, tiny.batch(1, 600))
        streamed(net, chunk="auto", loss_chunk="auto", memory="1GB")
        got = tiny.step(net, tiny.batch(1, 600))[1]
        assert largest_difference(got, want)[0] <= 1e-10
        report = fxmem.explain(net)
        assert report.whole and "budget" in str(report)
        taken = peak(net, tiny.batch(1, 600)) - weights(net)
        assert report.predicted_peak_bytes
        assert taken <= 1.02 * report.predicted_peak_bytes + 2**20
        for length in (300, 599, 700, 650):
            tiny.step(net, tiny.batch(1, length))
        assert asked == [600, 700]
        net.zero_grad()
        graph = graph_of(net)
        graph.holding = Budget(graph, Stream(memory=weights(net) + taken - 2**21))
        got = tiny.step(net, tiny.batch(1, 600))[1]
        assert largest_difference(got, want)[0] <= 1e-10
        assert not fxmem.explain(net).whole
        assert peak(net, tiny.batch(1, 600)) <= weights(net) + taken - 2**21


def test_chunks_become_shorter_where_nothing_else_fits() -> None:
    with everything_in_double():
        net = tiny.model(num_hidden_layers=2, hidden_size=64, vocab_size=4096).double()
        inputs = tiny.batch(1, 600)
        loss, want = tiny.step(net, inputs)
        streamed(net, chunk="auto", loss_chunk="auto", memory="25MB")
        tiny.step(net, inputs)
        graph, sizes = graph_of(net), {"T": 600}
        net.zero_grad()
        budget = graph.holding
        assert isinstance(budget, Budget)
        longest, short = (needed(budget._fastest(sizes, 0, True, s)[1]) for s in (1, 4))
        assert short + 2**21 < longest
        graph.holding = Budget(graph, Stream(memory=weights(net) + short + 2**20))
        got_loss, got = tiny.step(net, inputs)
        assert graph.kept.shrink in (2, 4)
        assert fxmem.explain(net).regions[1].chunk < 384
        assert largest_difference(got, want)[0] <= 1e-10
        assert abs(got_loss - loss) <= 1e-10 * abs(loss)


def test_offload_takes_the_inputs_of_layers(
    captured: Captured,
) -> None:
    net, want = captured
    under(net)
    kept = peak(net, tiny.batch(1, 1200))
    under(net, offload="disk")
    assert kept - peak(net, tiny.batch(1, 1200)) >= 1200 * 64 * 8
    taken = peak(net, tiny.batch(1, 600))
    got = {n: p.grad for n, p in net.named_parameters()}
    assert largest_difference(got, want)[0] <= 1e-10
    graph = graph_of(net)
    assert abs(predict(graph, graph.sizes).peak_bytes + weights(net) - taken) <= 2**19
    net.zero_grad()


def test_moved_to_the_same_place_is_a_note(model: nn.Module) -> None:
    net = streamed(copy.deepcopy(model), offload="cpu")
    with pytest.warns(fxmem.FxmemWarning, match='the model is on the CPU; take "disk"'):
        tiny.step(net, tiny.batch(1, 100))


def test_blocks_and_offload() -> None:
    with everything_in_double():
        found = []
        for options in ({}, {"offload": "disk"}):
            torch.manual_seed(0)
            net = tiny.model(num_hidden_layers=LAYERS, hidden_size=64).double()
            stream = Stream(chunk=64, loss_chunk=64, **options)  # type: ignore[arg-type]
            fxmem.transform(net, Plan(stream=stream, blocks=fxmem.Blocks(steps=1)))
            optimizer = fxmem.BlockAdamW(net, lr=1e-2)
            for step in range(3):
                net(**tiny.batch(1, 200 + step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append({n: p.detach().clone() for n, p in net.named_parameters()})
        assert largest_difference(found[1], found[0])[0] <= 1e-10
    with pytest.raises(fxmem.PlanError, match="Stream.memory is '1GB' beside Plan.blocks"):
        Plan(stream=Stream(memory="1GB"), blocks=fxmem.Blocks())


def test_the_program_is_solved_exactly() -> None:
    """Against every choice, on small random programs."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(20):
        options = [
            [Option(0, False, draw(9), 0), Option(1, False, draw(5), draw(9) << 20),
             Option(1, True, draw(9), -(draw(3) << 20), moving=draw(4) << 20)]
            for _ in range(3)
        ]  # fmt: skip
        marks = [(at, draw(9) << 20) for at in range(6)]
        limit = (draw(20) << 20) + 1
        best = math.inf
        for number in range(27):
            chosen = [o[number // 3**i % 3] for i, o in enumerate(options)]
            if all(alive + _at(chosen, at) <= limit for at, alive in marks):
                best = min(best, sum(o.seconds for o in chosen))
        found = _solve(options, marks, limit)
        assert (math.inf if found is None else sum(o.seconds for o in found)) == best


def _at(chosen: list[Option], at: int) -> int:
    total, last = 0, 2 * len(chosen) - 1
    for i, o in enumerate(chosen):
        end = last - i
        total += o.forward if at == i else 0
        total += o.between if i < at <= end else 0
        total += o.moving if i < at <= end and at in (i + 1, end - 1, end) else 0
    return total


def test_marks_are_what_the_replay_says(
    captured: Captured,
) -> None:
    graph = graph_of(captured[0])
    sizes = {"T": 300}
    marks = Step(graph, sizes, nothing(captured[0])).marks()
    peak = Step(graph, sizes, nothing(captured[0])).predict().peak_bytes
    assert max(b for _, b in marks) == peak
    assert {at for at, _ in marks} >= set(range(2 * len(graph.calls)))


@pytest.mark.parametrize("memory", ["24GBB", 0, -1, "most", 1.5, True])
def test_nonsense_sizes(memory: Any) -> None:
    with pytest.raises(fxmem.PlanError, match="Stream.memory is"):
        Stream(memory=memory)
