"""Which parameters require a gradient may change at every step: one capture, exact, no work."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import tiny
import torch
import torch.nn.functional as F
from double import everything_in_double
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import InternalError, Plan, Stream, api
from fxmem.compiler import compile as compiled
from fxmem.runtime.autograd import RegionFunction

PLAN = Plan(stream=Stream(chunk=4, loss_chunk=4))
D, V, LAYERS = 8, 11, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q = self.mix(self.norm(x)).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        return x + self.out(x.tanh())


class Net(nn.Module):
    """Tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(V, D), nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def pair(make: Callable[[], nn.Module] = Net) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    net = make().double()
    return fxmem.transform(copy.deepcopy(net), PLAN), net, torch.randint(V, (2, 13))


def freeze(net: nn.Module, learns: Callable[[str], bool]) -> None:
    for name, p in net.named_parameters():
        p.requires_grad_(learns(name))


def agree(streamed: nn.Module, plain: nn.Module, ids: Tensor) -> None:
    """One step of both: loss, gradients, and what has none."""
    losses = []
    for net in (streamed, plain):
        net.zero_grad()
        flags = [p.requires_grad for p in net.parameters()]
        losses.append(net(ids))
        assert [p.requires_grad for p in net.parameters()] == flags
        if any(flags):
            losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    assert losses[0].requires_grad == losses[1].requires_grad
    for (n, p), q in zip(streamed.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), n
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=n)


def captures(net: nn.Module) -> int:
    return len(api._TRANSFORMED[net].graphs)


NAMES = [n for n, _ in Net().named_parameters()]


def any_sequence(patterns: list[set[str]]) -> None:
    streamed, plain, ids = pair()
    for pattern in patterns:
        for net in (streamed, plain):
            freeze(net, pattern.__contains__)
        agree(streamed, plain, ids)
    assert captures(streamed) <= 2


@pytest.mark.parametrize("examples", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_any_sequence_of_patterns(examples: int) -> None:
    patterns = st.lists(st.sets(st.sampled_from(NAMES)), min_size=2, max_size=4)
    given(patterns)(settings(max_examples=examples)(any_sequence))()


def test_many_patterns_are_two_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LISA does: other layers learn at each step."""
    monkeypatch.setattr(api, "RECAPTURES", 3)
    streamed, plain, ids = pair()
    chosen = random.Random(0)
    for _ in range(12):
        alive = chosen.sample(range(LAYERS), chosen.randint(1, 2))
        for net in (streamed, plain):
            freeze(net, lambda n, alive=alive: any(f"layers.{i}." in n for i in alive))
        agree(streamed, plain, ids)
    assert captures(streamed) == 2


def test_what_is_frozen_costs_no_gradient_and_no_autograd() -> None:
    streamed, plain, ids = pair()
    agree(streamed, plain, ids)
    for net in (streamed, plain):
        freeze(net, lambda n: n == "layers.2.out.weight")
    agree(streamed, plain, ids)
    assert captures(streamed) == 1
    loss, nodes = streamed(ids), set()
    queue = [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            queue += [n for n, _ in node.next_functions]
    regions = [n for n in nodes if "RegionFunction" in type(n).__name__]
    assert RegionFunction.__name__ in type(regions[0]).__name__
    assert len(regions) < len(fxmem.explain(streamed).regions)
    made = [
        program
        for call in api._TRANSFORMED[streamed].graphs[0].calls
        for (kind, _), program in call.code.programs.items()
        if kind.startswith("backward:")
    ]
    assert any(sum(o is not None for o in program.outputs) == 1 for program in made)


def test_a_transformers_model_with_dropout_masks_and_ties() -> None:
    with everything_in_double():
        plain = tiny.model("qwen2").double()
        streamed = fxmem.transform(copy.deepcopy(plain), PLAN)
        for part in ("layers.1", "embed", "mlp", "layers.0.self_attn"):
            for net in (plain, streamed):
                freeze(net, lambda n, part=part: part in n)
            (_, want), (_, got) = (tiny.step(net, tiny.batch()) for net in (plain, streamed))
            assert want.keys() == got.keys()
            for name, grad in want.items():
                torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12)
    assert captures(streamed) == 2


class Asks(Net):
    """Its forward depends on a flag, of a parameter and of an activation."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if not self.layers[0].mix.weight.requires_grad:
            x = x * 2
        x = self.layers[0](x)
        if x.requires_grad:
            x = x.tanh()
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def test_a_model_that_asks_for_a_flag_is_told_the_truth() -> None:
    streamed, plain, ids = pair(Asks)
    for pattern in ("", "layers.0.mix", "layers.0.out", "embed", ""):
        for net in (streamed, plain):
            freeze(net, lambda n, pattern=pattern: pattern in n)
        agree(streamed, plain, ids)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_see_the_truth() -> None:
    streamed, plain, ids = pair()
    seen: dict[nn.Module, list[Tensor]] = {streamed: [], plain: []}
    for net in (streamed, plain):
        layer = net.get_submodule("layers.1")
        layer.register_full_backward_hook(
            lambda _, __, out, net=net: seen[net].append(out[0].sum())
        )
    for pattern in ("", "layers.2", "layers.1", "layers.0", ""):
        for net in (streamed, plain):
            freeze(net, lambda n, pattern=pattern: pattern in n)
        agree(streamed, plain, ids)
    torch.testing.assert_close(seen[streamed], seen[plain], rtol=1e-10, atol=1e-12)


def test_flags_are_back_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, plain, ids = pair()
    for net in (streamed, plain):
        freeze(net, lambda n: "layers.1" in n)
    agree(streamed, plain, ids)
    for net in (streamed, plain):
        freeze(net, lambda n: "layers.2" in n)
    flags = [p.requires_grad for p in streamed.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "run_passes", lambda *_: {}["T"])
        with pytest.raises((InternalError, KeyError)):
            streamed(ids)
    assert [p.requires_grad for p in streamed.parameters()] == flags
    agree(streamed, plain, ids)
