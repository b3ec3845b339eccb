"""Chunks of a batch have the strides of the whole; some kernels read operands without a look at
them."""

from __future__ import annotations

import copy

import torch
from double import largest_difference
from torch import Tensor, nn
from torch.nn import functional as fn

import fxmem
from fxmem import Plan, Stream

D, VOCAB, PREFIX = 8, 11, 5


class Prefixed(nn.Module):
    """States that learn stand before the tokens, whose norm has loops of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = (
            nn.Embedding(VOCAB, D), nn.LayerNorm(D), nn.Linear(D, VOCAB),
        )  # fmt: skip
        self.prefix = nn.Parameter(torch.randn(PREFIX, D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = torch.cat((self.prefix.expand(len(ids), -1, -1), x), 1)
        k = x[:, None]
        x = x + fn.scaled_dot_product_attention(k, k, k, is_causal=True)[:, 0]
        return fn.cross_entropy(self.head(x)[:, PREFIX:].flatten(0, 1), ids.flatten())


def test_what_a_norm_has_kept_of_a_batch() -> None:
    net = Prefixed().double()
    plain = copy.deepcopy(net)
    fxmem.transform(net, Plan(stream=Stream(chunk=3, loss_chunk=3)))
    ids = torch.randint(VOCAB, (3, 14))
    net(ids).backward()
    plain(ids).backward()
    got, want = ({n: p.grad for n, p in m.named_parameters()} for m in (net, plain))
    difference, where = largest_difference(got, want)  # type: ignore[arg-type]
    assert difference <= 1e-10, where
