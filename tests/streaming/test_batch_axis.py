"""A model that fixes its length still streams along the batch: chunks are of sequences, whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem

D, LENGTH = 8, 13


class Fixed(nn.Module):
    """One attention layer with a constant per position."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Embedding(11, D), nn.Linear(D, 11)
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("position", torch.randn(LENGTH, D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        q, k = (f(x).view(*x.shape[:2], 2, D // 2).transpose(1, 2) for f in (self.query, self.key))
        mask = None
        if self.kind == "padding":
            at = torch.arange(LENGTH)
            seen = (ids != 0)[:, None, None, :] & (at[:, None] >= at)
            mask = seen | (at[:, None] == at)
        y = F.scaled_dot_product_attention(q, k, k, mask, is_causal=self.kind == "causal")
        x = x + y.transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("kind", ["causal", "full", "padding"])
def test_chunks_of_the_batch(kind: str, chunk: int) -> None:
    net = Fixed(kind).double()
    plain = copy.deepcopy(net)
    ids = torch.randint(11, (3, LENGTH))
    fxmem.transform(net, fxmem.Plan(stream=fxmem.Stream(chunk=chunk, loss_chunk=chunk)))
    loss = net(ids)
    loss.backward()
    want = plain(ids)
    want.backward()
    assert fxmem.explain(net).executed_bodies
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10 * float(q.grad.abs().max()))
