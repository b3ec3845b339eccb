"""Results of attention that are held from forward to backward: which, where, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fxmem
from fxmem import Plan, Stream, api
from fxmem.compiler.step import CompiledGraph
from fxmem.measure import live as measure
from fxmem.runtime import retention as holding
from fxmem.runtime.counters import COUNTER
from fxmem.runtime.retention import Moment, choose

KINDS = ["llama", "qwen3", "gemma3", "gpt2", "mistral-5", "mixtral"]


def streamed(net: nn.Module, **options: Any) -> None:
    fxmem.transform(net, Plan(stream=Stream(**{"chunk": 7, "loss_chunk": 7, **options})))


def graph_of(net: nn.Module) -> CompiledGraph:
    return api._TRANSFORMED[net].graphs[-1]


def wide() -> nn.Module:
    """Weights that count beside the states of some hundred tokens."""
    return tiny.model(
        num_hidden_layers=4, hidden_size=128, intermediate_size=512, max_position_embeddings=4096
    )


def attention_calls(net: nn.Module, kind: str) -> int:
    """Calls of attention's forward in the layers' programs of this kind."""
    codes = {id(c.code): c.code for c in graph_of(net).calls if c.code.held}.values()
    assert codes
    return sum(
        node.target is fxmem.kernels.attention.forward
        for code in codes
        for loop in code.program(kind).loops
        for node in loop.module.graph.nodes
    )


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_exact_with_held_results(
    name: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        holding, "choose", lambda found, **_: frozenset(i for i, m in enumerate(found) if m.held)
    )
    with everything_in_double():
        net = tiny.model(name).double()
        inputs = tiny.batch(2, 40) if padding == "none" else tiny.batch(2, 40, padding)
        loss, want = tiny.step(net, inputs)
        streamed(net)
        got_loss, got = tiny.step(net, inputs)
        assert len(graph_of(net).holding(graph_of(net).sizes)) == 2
        difference, where = largest_difference(got, want)
        assert difference <= 1e-10, where
        assert abs(got_loss - loss) <= 1e-10 * abs(loss)


def test_attention_is_not_run_again_where_its_results_are_held() -> None:
    net = tiny.model()
    streamed(net)
    tiny.step(net, tiny.batch(1, 40))
    assert attention_calls(net, "forward+1") == attention_calls(net, "forward") == 1
    assert attention_calls(net, "backward") == 1
    assert attention_calls(net, "backward+1") == 0


def test_none_makes_everything_again() -> None:
    net = tiny.model()
    streamed(net, hold="none")
    tiny.step(net, tiny.batch(1, 40))
    assert graph_of(net).holding(graph_of(net).sizes) == frozenset()


@pytest.mark.parametrize("length", [pytest.param(130, marks=pytest.mark.slow), 200])
def test_the_peak_stays_where_it_was(length: int) -> None:
    """The room is less the longer the sequence."""
    peaks, held = [], []
    inputs = tiny.batch(1, length)
    for hold in ("none", "auto"):
        torch.manual_seed(0)
        net = tiny.model(num_hidden_layers=6, hidden_size=128, max_position_embeddings=4096)
        streamed(net, hold=hold, chunk=64, loss_chunk=64)
        tiny.step(net, inputs)
        net.zero_grad(set_to_none=True)
        peaks.append(measure.track(lambda net=net: net(**inputs).loss.backward()).peak)
        held.append(len(graph_of(net).holding(graph_of(net).sizes)))
    assert held[0] == 0 < held[1]
    assert peaks[1] <= 1.005 * peaks[0]


def test_a_second_micro_batch_holds_less() -> None:
    """Gradients that are there already do not come into being during the backward."""
    net = wide()
    streamed(net, chunk=64, loss_chunk=64)
    inputs = tiny.batch(1, 400)
    tiny.step(net, inputs)
    graph = graph_of(net)
    assert len(graph.holding(graph.sizes, fresh=False)) < len(graph.holding(graph.sizes))


def test_other_lengths_need_no_new_program() -> None:
    net = wide()
    streamed(net, chunk=64, loss_chunk=64)
    tiny.step(net, tiny.batch(1, 128))
    net.zero_grad(set_to_none=True)
    programs, counts = COUNTER.programs, set()
    for length in (200, 900, 3000):
        tiny.step(net, tiny.batch(1, length))
        net.zero_grad(set_to_none=True)
        counts.add(len(graph_of(net).holding(graph_of(net).sizes)))
    assert len(counts) > 1
    assert COUNTER.programs == programs


def test_held_results_wait_for_their_own_backward() -> None:
    """Two forwards before two backwards, and one without a backward in between."""
    with everything_in_double():
        net = tiny.model().double()
        first, second = tiny.batch(1, 30), tiny.batch(2, 41)
        want = [tiny.step(net, inputs)[1] for inputs in (first, second)]
        streamed(net)
        net.zero_grad()
        losses = [net(**inputs).loss for inputs in (first, second)]
        net(**first)
        losses[1].backward()
        losses[0].backward()
        got = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        total = {n: want[0][n] + want[1][n] for n in want[0]}
        assert largest_difference(got, total)[0] <= 1e-10


def test_a_checkpoint_around_a_streamed_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second run is told to stop early, and saves what the first did although there are
    gradients by then.
    """
    monkeypatch.setattr(
        holding, "choose", lambda found, accumulates: frozenset(range(len(found) * accumulates))
    )
    with everything_in_double():
        net, parts = tiny.model().double(), [tiny.batch(1, 30), tiny.batch(2, 41)]
        want = [tiny.step(net, inputs)[1] for inputs in parts]
        streamed(net)
        net.zero_grad()
        call = lambda inputs: net(**inputs).loss  # noqa: E731
        for early in (True, False):
            net.zero_grad()
            with set_checkpoint_early_stop(early):
                losses = [checkpoint(call, inputs, use_reentrant=False) for inputs in parts]
            (losses[0] + losses[1]).backward()
            got = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
            assert (
                largest_difference(got, {n: want[0][n] + want[1][n] for n in want[0]})[0] <= 1e-10
            )


moments = st.lists(
    st.builds(Moment, *(st.integers(0, 100) for _ in range(4))), min_size=1, max_size=8
)


def peak(found: list[Moment], chosen: frozenset[int], accumulates: bool) -> int:
    """By playing the step: the forward saves, the backward frees region after region."""
    alive = sum(m.saved + (m.held if i in chosen else 0) for i, m in enumerate(found))
    top = 0.0
    for i in reversed(range(len(found))):
        m = found[i]
        top = max(top, alive + m.working + m.gradients)
        alive -= m.saved + (m.held if i in chosen else 0)
        alive += m.gradients if accumulates else 0
    return int(top)


@given(moments, st.booleans())
def test_the_choice_never_raises_the_peak(found: list[Moment], accumulates: bool) -> None:
    chosen = choose(found, accumulates=accumulates)
    before = peak(found, frozenset(), accumulates)
    assert peak(found, chosen, accumulates) == before
    # and it is the longest such run of last regions
    for first in range(len(found)):
        run = frozenset(i for i in range(first, len(found)) if found[i].held)
        if not run <= chosen:
            assert peak(found, run, accumulates) > before
