"""Dimensions of size zero: layers that were pruned to nothing, and slices without rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from double import largest_difference
from torch import Tensor, nn
from torch.nn import functional as fn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 4, 7
Layer = Callable[["Model", Tensor], Tensor]


def heads(m: Model, x: Tensor) -> Tensor:
    q = m.up(x).unflatten(-1, (0, 3)).transpose(1, 2)
    return m.down(
        fn.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
    )


LAYERS: dict[str, Layer] = {
    "mlp": lambda m, x: m.down(fn.gelu(m.up(x))),
    "gated": lambda m, x: m.down(fn.silu(m.up(x)) * m.up(x)),
    "heads": heads,
    "softmax": lambda m, x: m.down(m.up(x).softmax(-1)),
    "rows": lambda m, x: m.down(m.up(x.flatten(0, 1))).view(x.shape),
    "joined": lambda m, x: torch.cat([x, m.up(x)], -1),
    "no_rows": lambda m, x: m.square(x)[:, x.shape[1] :].sum(1, keepdim=True),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.up, self.down, self.square = nn.Linear(D, 0), nn.Linear(0, D), nn.Linear(D, D)
        self.layer = LAYERS[layer]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.layer(self, x)
        x = x + fn.silu(self.square(x))
        return fn.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def step(model: Model, call: Callable[[Tensor], Tensor], length: int) -> dict[str, Tensor]:
    model.zero_grad()
    ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    loss = call(ids)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()}
    return {**{n: g.clone() for n, g in found.items()}, "loss": loss.detach()}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_without_channels(layer: str) -> None:
    torch.compiler.reset()
    model = Model(layer).double()
    engine = fxmem.backend(Plan(stream=Stream(chunk=4, loss_chunk=4)))
    streamed = torch.compile(model, backend=engine, fullgraph=True)
    for length in (9, 1):
        want = step(model, model, length)
        error, name = largest_difference(step(model, streamed, length), want)
        assert error < 1e-10, f"{name} differs by {error:.1e} at {length} tokens"
