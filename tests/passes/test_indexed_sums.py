"""Learned tables that are read by plain indexing: their gradients are sums that chunks add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from streams import streams
from torch import Tensor, nn

D, VOCAB, PLACES = 6, 11, 16


class Net(nn.Module):
    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.embed, self.mix = nn.Embedding(VOCAB, D), nn.Linear(D, 3 * D)
        self.table, self.head = nn.Parameter(torch.randn(PLACES, D)), nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embed(ids)) + self.read(self.table, ids)
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ids": lambda table, ids: table[ids],
    "from the end": lambda table, ids: table.tanh()[ids - VOCAB],
    "positions": lambda table, ids: table[torch.arange(ids.shape[1])],
    "selected": lambda table, ids: table.index_select(0, ids.flatten()).view(*ids.shape, D),
}


@pytest.mark.parametrize("name", READS)
def test_gradients_of_tables_stream(name: str) -> None:
    torch.manual_seed(0)
    streams(Net(READS[name]), VOCAB, 3)
