"""Windows over earlier tokens stream, along any axis and in the spellings that people use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from streams import exact, streams
from torch import Tensor, nn

D, VOCAB = 6, 11


class Net(nn.Module):
    """A convolution of ``rows`` taps, whose weights each token makes of itself."""

    def __init__(self, rows: int, spelling: str) -> None:
        super().__init__()
        self.rows, self.spelling = rows, spelling
        self.embed, self.taps = nn.Embedding(VOCAB, D), nn.Linear(D, rows)
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, VOCAB)

    def windows(self, x: Tensor) -> Tensor:
        before, length = self.rows - 1, x.shape[1]
        if self.spelling == "length last":
            padded = F.pad(x.transpose(1, 2), (before, 0))[..., -(length + before) :]
            return padded.unfold(-1, self.rows, 1).flip(-1).transpose(1, 2)
        if self.spelling == "joined":
            zeros = torch.zeros(len(x), before, D, dtype=x.dtype)
            return torch.cat([zeros, x], 1).unfold(1, self.rows, 1)
        return F.pad(x, (0, 0, before, 0)).unfold(dimension=1, size=self.rows, step=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.embed(ids))
        x = x + (self.windows(x) * self.taps(x).softmax(-1).unsqueeze(2)).sum(-1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize(
    ("spelling", "rows", "chunk"), [("length last", 4, 3), ("joined", 3, 1), ("padded", 2, 5)]
)
def test_windows_over_earlier_tokens(spelling: str, rows: int, chunk: int) -> None:
    torch.manual_seed(0)
    streams(Net(rows, spelling), VOCAB, chunk)


class Named(nn.Module):
    """A state that is learned, under a name that says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.zeros = nn.Parameter(torch.randn(1, 2, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids[:1])
        x = x + torch.cat([self.zeros, x], 1).unfold(1, 3, 1).sum(-1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids[:1].flatten())


def test_a_name_makes_no_zeros() -> None:
    torch.manual_seed(0)
    exact(Named(), VOCAB, 3)
