"""Which outputs beside a loss stay inside: those that grow with the length, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import largest_difference
from torch import Tensor, nn
from torch.nn import functional as fn

import fxmem
from fxmem import Plan, Stream
from fxmem.frontend.dropped_outputs import DroppedTensor

WIDE = 16
"""Elements per token: more than what leaves the graph anyway."""


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table, self.head, self.kind = nn.Embedding(11, WIDE), nn.Linear(WIDE, 11), kind

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids).tanh()
        z = self.head(x)
        if self.kind == "pooled":
            return fn.cross_entropy(z.flatten(0, 1), ids.flatten()), x.mean(1)
        ahead = fn.cross_entropy(z[:, :-2].flatten(0, 1), ids[:, 2:].flatten())
        return ahead, x


@pytest.mark.parametrize(
    ("kind", "length", "leaves"),
    # three: two less than it is one, for which torch fixes the length; then the batch streams
    [("pooled", 9, True), ("ahead", 9, False), ("ahead", 3, False)],
)
def test_what_does_not_grow_with_the_length_leaves_the_graph(
    kind: str, length: int, leaves: bool
) -> None:
    torch.compiler.reset()
    net = Net(kind).double()
    ids = torch.arange(2 * length).view(2, -1) % 11
    plan = Plan(stream=Stream(chunk=2))
    streamed = torch.compile(net, backend=fxmem.backend(plan), fullgraph=True)
    found: list[dict[str, Tensor]] = []
    for model in (net, streamed):
        net.zero_grad()
        loss, state = model(ids)
        dropped = isinstance(state, DroppedTensor)
        (loss if dropped or not leaves else loss + state.cos().mean()).backward()
        found.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert dropped != leaves
    assert largest_difference(found[1], found[0])[0] < 1e-10
