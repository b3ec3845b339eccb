"""Statements of BREAD (Luo et al., NeurIPS 2025) about what block training can reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan
from fxmem.blocks.attach import state_of


class Tower(nn.Module):
    """Matrices with an activation between them, on ``[batch, rows, features]``."""

    def __init__(self, widths: list[int], act: Any) -> None:
        super().__init__()
        self.stack = nn.ModuleList(
            nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.stack[:-1]:
            x = self.act(layer(x))
        out: torch.Tensor = self.stack[-1](x)
        return out


def mse(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (out - y).square().mean()


def nll(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(out.flatten(0, 1), y)


def train(net: Tower, blocks: Blocks, lr: float, x: torch.Tensor, y: torch.Tensor, steps: int,
          objective: Any = mse) -> list[float]:  # fmt: skip
    fxmem.transform(net, Plan(blocks=blocks))
    for term in state_of(net).adapters.values():
        term.down.data *= 6**0.5  # the paper's bound sqrt(6 / in); the default is 1 / sqrt(in)
    opt = BlockAdamW(net, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = objective(net(x), y)
        losses.append(loss.item())
        loss.backward()
        opt.step()
        net.zero_grad()
    return losses


RATES = [(1e-3, 0.0), (1e-3, 1e-2), (1e-4, 0.1), (1e-2, 0.1)]


@pytest.mark.parametrize(
    ("alpha", "beta", "seed", "epochs"),
    [
        (1e-4, 0.1, 0, 6),
        *(
            pytest.param(*rates, seed, 30, marks=pytest.mark.slow)
            for rates in RATES
            for seed in range(3)
        ),
    ],
)
def test_small_steps_descend(alpha: float, beta: float, seed: int, epochs: int) -> None:
    """Never up with small steps; with larger ones up at steps, but not over a block-epoch."""
    torch.manual_seed(seed)
    net = Tower([16] * 5, torch.tanh).double()
    for p in net.parameters():
        p.data = torch.randn(16, 16, dtype=torch.float64) / 4
    x, y = (torch.randn(2, 32, 16, dtype=torch.float64) for _ in range(2))
    plan = Blocks(steps=5, order="ascending", inactive=SGD(beta), reach="all")
    losses = train(net, plan, alpha, x, y, 20 * epochs + 1)
    apart = 20 if alpha == 1e-2 else 1
    seen = losses[::apart]
    assert all(b <= a for a, b in zip(seen, seen[1:], strict=False))


def toy(seed: int) -> tuple[Tower, torch.Tensor, torch.Tensor]:
    """256 samples of a random ReLU network of 8 layers, and another one to learn them."""
    torch.manual_seed(seed)
    samples = torch.randn(256, 64)
    teacher, student = ([torch.randn(64, 64) / 8 * 1.4 for _ in range(8)] for _ in range(2))
    drawn = torch.get_rng_state()
    nets = [Tower([64] * 9, torch.relu) for _ in range(2)]
    for net, weights in zip(nets, (teacher, student), strict=True):
        for p, value in zip(net.parameters(), weights, strict=True):
            p.data = value
    x = samples.view(2, 128, 64)
    with torch.no_grad():
        y = nets[0](x)
    torch.set_rng_state(drawn)
    return nets[1], x, y


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_expansion_helps_ascending_blocks(seed: int) -> None:
    found: dict[str, list[float]] = {}
    options: dict[str, Any] = {"steps": 100, "order": "ascending", "guard": False}
    for name, kind, reach in (
        ("badam", None, "all"),
        ("low_rank", LowRank(rank=1, alpha=1.0), "all"),
        ("sgd", SGD(0.1), "deeper"),
    ):
        net, x, y = toy(seed)
        blocks = Blocks(inactive=kind, reach=reach, **options)
        losses = train(net, blocks, 1e-3, x, y, 600)
        found[name] = [losses[299], losses[599]]
    for i in range(2):
        assert found["badam"][i] >= 4 * found["low_rank"][i]
        assert found["badam"][i] >= 4 * found["sgd"][i]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_equal_rows_of_the_head_have_a_floor_that_rank_one_removes(seed: int) -> None:
    """Cross-entropy: two equal rows, the target's among them, give a loss of at least log 2 for any
    weights before them.
    """
    torch.manual_seed(seed)
    outer = torch.randn(5, 4, dtype=torch.float64)
    outer[3] = outer[0]
    x = (torch.rand(4, dtype=torch.float64) + 0.1).expand(1, 2, 4).contiguous()
    first = torch.rand(4, 4, dtype=torch.float64)
    middle = torch.randn(4, 4, dtype=torch.float64).abs()
    target = torch.zeros(2, dtype=torch.long)
    ends = {}
    for name, kind in (("frozen", None), ("rank one", LowRank(rank=1, alpha=1.0))):
        net = Tower([4, 4, 4, 5], torch.relu).double()
        for p, value in zip(net.parameters(), (first, middle, outer), strict=True):
            p.data = value.clone()
        blocks = Blocks(
            partition=(("stack.0",), ("stack.1",), ("stack.2",)), order="fixed", start=1,
            inactive=kind,
        )  # fmt: skip
        ends[name] = train(net, blocks, 2e-2, x, target, 4000, nll)
    assert min(ends["frozen"]) >= math.log(2)
    assert ends["rank one"][-1] < 1e-4


@pytest.mark.slow
def test_a_fixed_output_layer_has_a_floor_that_rank_one_removes() -> None:
    torch.manual_seed(0)
    outer = torch.randn(6, 4, dtype=torch.float64)
    x = (torch.rand(4, dtype=torch.float64) + 0.1).expand(1, 2, 4).contiguous()
    first = torch.rand(4, 4, dtype=torch.float64)
    middle = torch.randn(4, 4, dtype=torch.float64).abs()
    target = outer @ torch.tensor([1, -1, 2, -0.5], dtype=torch.float64)
    y = target.expand(1, 2, 6).contiguous()
    # min over z >= 0 of |outer z - target|^2, by the active sets
    floor = min(
        (outer[:, keep] @ z - target).square().sum().item()
        for mask in range(1, 16)
        for keep in [[i for i in range(4) if mask >> i & 1]]
        for z in [torch.linalg.lstsq(outer[:, keep], target[:, None]).solution[:, 0]]
        if (z >= 0).all()
    )
    ends = {}
    for name, kind in (("frozen", None), ("rank one", LowRank(rank=1, alpha=1.0))):
        net = Tower([4, 4, 4, 6], torch.relu).double()
        for p, value in zip(net.parameters(), (first, middle, outer), strict=True):
            p.data = value.clone()
        blocks = Blocks(
            partition=(("stack.0",), ("stack.1",), ("stack.2",)), order="fixed", start=1,
            steps=4000, inactive=kind,
        )  # fmt: skip
        ends[name] = 6 * train(net, blocks, 2e-2, x, y, 4000)[-1]
    assert ends["frozen"] >= floor - 1e-9 > 1
    assert ends["rank one"] < 1e-6
