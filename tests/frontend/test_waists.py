"""Models with two lengths: an encoder, and a decoder that reads it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 8, 13


class Layer(nn.Module):
    def __init__(self, crosses: bool, after: bool) -> None:
        super().__init__()
        self.after, self.crosses = after, crosses
        self.mix, self.read = nn.Linear(D, 3 * D), nn.Linear(D, 2 * D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))

    def added(self, at: int, x: Tensor, y: Tensor) -> Tensor:
        return self.norms[at](x + y) if self.after else x + y

    def normed(self, at: int, x: Tensor) -> Tensor:
        return x if self.after else self.norms[at](x)

    def forward(self, x: Tensor, other: Tensor | None, keep: Tensor | None) -> Tensor:
        q, k, v = self.mix(self.normed(0, x)).unsqueeze(1).chunk(3, -1)
        own = None if self.crosses else keep
        seen = F.scaled_dot_product_attention(q, k, v, own, is_causal=self.crosses)
        x = self.added(0, x, seen.squeeze(1))
        if other is not None:
            k, v = self.read(other).unsqueeze(1).chunk(2, -1)
            q = self.normed(1, x).unsqueeze(1)
            x = self.added(1, x, F.scaled_dot_product_attention(q, k, v, keep).squeeze(1))
        return self.added(2, x, self.down(F.gelu(self.up(self.normed(2, x)))))


class Reader(nn.Module):
    def __init__(self, layers: int, after: bool, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.table, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.encoder = nn.ModuleList(Layer(False, after) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(True, after) for _ in range(layers))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.table(source), self.table(target)
        keep = (source > 2)[:, None, None] if self.padded else None
        for layer in self.encoder:
            x = layer(x, None, keep)
        for layer in self.decoder:
            y = layer(y, x, keep)
        return F.cross_entropy(self.head(y).flatten(0, 1), target.flatten())


def step(net: nn.Module, lengths: tuple[int, int]) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(sum(lengths))
    given = [torch.randint(VOCAB, (2, n), generator=source) for n in lengths]
    net.zero_grad()
    loss = net(*given)
    loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def pair(layers: int, after: bool, padded: bool, chunk: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Reader(layers, after, padded).double()
    plan = Plan(stream=Stream(chunk=chunk, loss_chunk=chunk))
    return fxmem.transform(copy.deepcopy(plain), plan), plain


@pytest.mark.parametrize(
    ("lengths", "after", "padded"),
    [
        ((23, 9), False, False),
        ((9, 23), True, True),
        ((23, 9), True, False),
        ((9, 23), False, True),
    ],
)
def test_each_layer_of_either_part_is_a_region_and_streams(
    lengths: tuple[int, int], after: bool, padded: bool
) -> None:
    streamed, plain = pair(3, after, padded, 4)
    assert largest_difference(step(streamed, lengths), step(plain, lengths))[0] < 1e-10
    assert not fxmem.explain(streamed).barriers
    graph = fxmem.api._TRANSFORMED[streamed].graphs[0]
    for part in ("encoder", "decoder"):
        inside = [c.modules for c in graph.calls if f"{part}.1" in c.modules]
        assert inside and not any(f"{part}.0" in m and f"{part}.2" in m for m in inside)


@given(
    layers=st.integers(1, 3), after=st.booleans(), padded=st.booleans(),
    chunk=st.sampled_from((1, 3, 7, 40)),
    lengths=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=2),
)  # fmt: skip
@settings(max_examples=3, deadline=None)
def test_any_lengths(
    layers: int, after: bool, padded: bool, chunk: int, lengths: list[tuple[int, int]]
) -> None:
    streamed, plain = pair(layers, after, padded, chunk)
    for pairs in lengths:
        assert largest_difference(step(streamed, pairs), step(plain, pairs))[0] < 1e-10
