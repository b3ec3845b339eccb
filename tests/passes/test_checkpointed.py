"""Activation checkpointing inside the captured graph: inlined, streamed, and exact."""

from __future__ import annotations

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxmem
from fxmem import Plan, Stream

STREAM = Plan(stream=Stream(chunk=7, loss_chunk=7))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpointed_model_streams(name: str) -> None:
    net = tiny.model(name).double()
    inputs = tiny.batch(2, 23, "mixed")
    with everything_in_double():
        loss, want = tiny.step(net, inputs)
        net.activation_checkpointing_enable()
        fxmem.transform(net, STREAM)
        got_loss, got = tiny.step(net, inputs)
        report = fxmem.explain(net)
    assert report.barriers == []
    assert report.executed_bodies
    assert [r.uses for r in report.regions if r.kind == "mixing"] == [2]
    assert abs(got_loss - loss) <= 1e-10 * abs(loss)
    difference, where = largest_difference(got, want)
    assert difference <= 1e-10, where


ASKED = {"llama": "output_hidden_states", "mixtral": "output_router_logits"}


@pytest.mark.parametrize(
    "name, reentrant",
    [
        ("llama", False),
        pytest.param("mixtral", False, marks=pytest.mark.slow),
        pytest.param("mixtral", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:aten.scatter_add:fxmem.FxmemWarning")
def test_what_hooks_record_inside_checkpoints(name: str, reentrant: bool) -> None:
    """Layers that write to a list of the model's, as transformers' hooks do."""

    def step(net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        net.zero_grad()
        out = net(**tiny.batch(2, 23, "mixed"), **{ASKED[name]: True})
        states = out.hidden_states or out.router_logits
        loss = out.loss + sum(s.square().mean() for s in states[1:])
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    net = tiny.model(name).double()
    with everything_in_double():
        loss, want = step(net)
        net.activation_checkpointing_enable({"use_reentrant": reentrant})
        fxmem.transform(net, STREAM)
        got_loss, got = step(net)
    assert not fxmem.explain(net).in_parts
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert largest_difference(got, want)[0] <= 1e-10


class Nested(nn.Module):
    """Checkpoints within a checkpoint, several results, a switch of grad mode inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scale = self.norm(x).abs().mean(-1, keepdim=True)
        return self.mix(x) * scale, scale

    def outer(self, x: Tensor) -> Tensor:
        y, scale = checkpoint(self.inner, self.norm(x), use_reentrant=False)
        q = y.unsqueeze(1)
        y = 2 * nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        y += x
        return y / (1 + scale)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(2):
            x = checkpoint(self.outer, x, use_reentrant=False)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def test_nested_checkpoints() -> None:
    net, ids = Nested().double(), torch.randint(11, (2, 17))

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        net.zero_grad()
        loss = net(ids)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    loss, want = gradients()
    fxmem.transform(net, STREAM)
    got_loss, got = gradients()
    assert fxmem.explain(net).executed_bodies
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert largest_difference(got, want)[0] <= 1e-10


class Branching(nn.Module):
    """Cannot be captured, with a checkpoint inside that needs something that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.sum() < 1e6 else -x
        return checkpoint(self.mix, x, use_reentrant=True)


class Frozen(nn.Module):
    """Nothing learns before the layer but on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(11, 8).requires_grad_(False), Branching()
        self.head = nn.Linear(8, 11).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).requires_grad_(True)
        return nn.functional.cross_entropy(self.head(self.layer(x)).flatten(0, 1), ids.flatten())


def test_a_checkpoint_in_a_part_that_runs_as_it_is() -> None:
    net, ids = Frozen().double(), torch.randint(11, (2, 17))
    net(ids).backward()
    want = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    with pytest.warns(fxmem.FxmemWarning, match="runs whole"):
        fxmem.transform(net, STREAM)(ids).backward()
    got = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert largest_difference(got, want)[0] <= 1e-10
    assert [p.name for p in fxmem.explain(net).pieces] == ["layer"]
