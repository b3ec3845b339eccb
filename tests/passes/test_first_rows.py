"""Shifts whose first rows the model sets itself, of a product as well as of what follows one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from streams import streams
from torch import Tensor, nn

D, VOCAB = 6, 11


class Net(nn.Module):
    """Each token is mixed with the one ``rows`` before; the first have learned ones, or zeros."""

    def __init__(self, rows: int, spelling: str = "learned") -> None:
        super().__init__()
        self.rows, self.spelling = rows, spelling
        self.embed, self.mix = nn.Embedding(VOCAB, D), nn.Linear(D, D)
        self.start, self.head = nn.Parameter(torch.randn(1, rows, D)), nn.Linear(2 * D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.embed(ids))
        before = x[:, : -self.rows]
        if self.spelling == "learned after":
            x = torch.tanh(x)
            before = x[:, : -self.rows]
        if self.spelling == "pad":
            before = F.pad(before, (0, 0, self.rows, 0)) + self.start[0, 0]
        elif self.spelling == "rolled":
            before = x.roll(self.rows, 1) + torch.roll(x.tanh(), -1, dims=1) * self.start[0, 0]
        elif self.spelling == "zeros":
            before = torch.cat([torch.zeros_like(x[:, : self.rows]), before], 1) * self.start[0, 0]
        else:
            before = torch.cat([self.mix(self.start).expand(len(x), -1, -1), before], dim=1)
        scores = self.head(torch.cat([x, before], -1))
        return F.cross_entropy(scores.flatten(0, 1), ids.flatten())


@pytest.mark.parametrize(
    ("spelling", "rows", "chunk"),
    [("learned after", 3, 2), ("learned", 1, 3), ("pad", 1, 3), ("zeros", 2, 3), ("rolled", 2, 3)],
)
def test_shifted_rows(spelling: str, rows: int, chunk: int) -> None:
    torch.manual_seed(0)
    streams(Net(rows, spelling), VOCAB, chunk)
