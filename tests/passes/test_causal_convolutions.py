"""Convolutions over earlier tokens, in the spellings that people use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import streams
from torch import Tensor, nn

D, VOCAB = 6, 11


class Net(nn.Module):
    """Convolutions ``(kernel, dilation, groups, bias)`` one after another of one padded value."""

    def __init__(self, convolutions: Sequence[tuple[int, int, int, bool]]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.mixes = nn.Sequential(
            *(nn.Conv1d(D, D, k, dilation=d, groups=g, bias=b) for k, d, g, b in convolutions)
        )
        self.reach = sum((k - 1) * d for k, d, _, _ in convolutions)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embed(ids)).transpose(1, 2)
        padded = F.pad(x, (self.reach, 0))
        if self.reach % 2:
            padded = torch.cat([x.new_zeros(len(x), D, self.reach), x], -1)
        x = x + self.mixes(padded)
        return F.cross_entropy(self.head(x.transpose(1, 2)).flatten(0, 1), ids.flatten())


CONVOLUTION = st.tuples(
    st.integers(2, 4), st.integers(1, 2), st.sampled_from([1, 2, D]), st.booleans()
)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CONVOLUTION, min_size=2, max_size=3), st.integers(1, 5))
def test_one_pad_serves_several_convolutions(
    convolutions: list[tuple[int, int, int, bool]], chunk: int
) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    streams(Net(convolutions), VOCAB, chunk)
