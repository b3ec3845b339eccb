"""`torch.compile(model, backend="fxmem")` where Dynamo breaks the graph: each part streams."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from attending import Layer
from torch import Tensor, nn

D = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, D), nn.Linear(D, 11)
        self.layers = nn.ModuleList(Layer(D) for _ in range(3))

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class Stops(Net):
    """Leaves out layers where a value says so."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
            if x.abs().mean().item() > 1e6:
                break
        return self.loss(x, ids)


class Drops(Net):
    """Leaves out layers by chance."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            if torch.rand(()).item() < 0.5:
                x = layer(x)
        return self.loss(x, ids)


class Prints(Net):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        print(f"{float(x.detach().mean())}")  # ":.3f" is an error of Dynamo's own in 2.14
        return self.loss(x, ids)


@pytest.mark.parametrize("kind", [Stops, Drops, Prints])
def test_every_part_is_exact(kind: type[Net]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = kind().double()
    own = copy.deepcopy(plain)
    compiled = torch.compile(own, backend="fxmem")
    for length in (13, 13, 9):
        ids = torch.randint(11, (2, length), generator=torch.Generator().manual_seed(length))
        for net in (compiled, plain):
            net.zero_grad()
            torch.manual_seed(length)
            net(ids).backward()
        for p, q in zip(own.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
