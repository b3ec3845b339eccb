"""Models whose inputs decide sizes (counts of tokens, positions of a kind): peaks are predicted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 8, 13
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "counts": lambda ids: torch.bincount(ids.flatten(), minlength=VOCAB)[ids],
    "places": lambda ids: torch.zeros_like(ids).index_put(
        tuple(torch.nonzero(ids % 2).unbind(1)), torch.ones((), dtype=torch.int64)
    ),
    "kinds": lambda ids: torch.unique(ids, return_inverse=True)[1],
    "runs": lambda ids: torch.unique_consecutive(ids, return_inverse=True)[1],
    "chosen": lambda ids: ids * torch.masked_select(ids, ids > 4).max(),
    "repeated": lambda ids: torch.repeat_interleave(torch.tensor([3, 0, 5, 5]))[ids],
}


class Net(nn.Module):
    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weigh = weigh
        self.embed, self.mix, self.head = (
            nn.Embedding(VOCAB, D), nn.Linear(D, 3 * D), nn.Linear(D, VOCAB),
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * (1 + self.weigh(ids).unsqueeze(-1) / VOCAB)
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("name", WEIGHTS)
def test_explained_and_exact(name: str) -> None:
    torch.manual_seed(0)
    plain = Net(WEIGHTS[name]).double()
    net = copy.deepcopy(plain)
    fxmem.transform(net, Plan(stream=Stream(chunk=5, loss_chunk=4)))
    for length in (13, 9):
        ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
        for one in (net, plain):
            one.zero_grad()
            one(ids).backward()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    report = fxmem.explain(net)
    assert report.predicted_peak_bytes and not report.pieces
