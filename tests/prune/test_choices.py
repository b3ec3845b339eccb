"""Which routers' experts can be pruned: decided from the dataflow alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxmem.prune.coupling.routers import choices


class Router(nn.Module):
    """A router whose scores or choices are used in some way beside the choice."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.table = nn.Parameter(torch.randn(6, 5))
        self.bias = nn.Parameter(torch.randn(6))
        self.register_buffer("buffer", torch.randn(6))
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        logits = nn.functional.linear(x, self.weight)
        if self.extra in ("bias", "buffer"):
            logits = logits + getattr(self, self.extra)
        if self.extra == "raw":
            value, index = logits.topk(2, dim=-1)
            value = value.softmax(-1)
            return (nn.functional.embedding(index, self.table) * value.unsqueeze(-1)).sum(1)
        if self.extra == "gathered":
            p = logits.sigmoid()
            index = p.topk(2, dim=-1)[1]
            value = p.gather(-1, index)
            return (nn.functional.embedding(index, self.table) * value.unsqueeze(-1)).sum(1)
        p = logits.softmax(0 if self.extra == "tokens" else -1)
        if self.extra == "twice":
            p = p.softmax(-1)
        if self.extra == "negative":
            p = p * -1.0
        if self.extra == "scaled":
            p = p * 2.5
        if self.extra == "groups":
            p = p.view(-1, 2, 3).reshape(-1, 6)
        if self.extra == "correction":
            p = p + self.bias
        value, index = p.topk(2, dim=-1)
        out = (nn.functional.embedding(index, self.table) * value.unsqueeze(-1)).sum(1)
        extras = {
            "scores": lambda: out + logits.sum(-1, keepdim=True),
            "index": lambda: out + index.sum(-1, keepdim=True),
            "weight": lambda: out + self.weight.sum(),
            "table": lambda: out + self.table.sum(),
            "last": lambda: out + logits.topk(2, largest=False)[0].sum(),
        }
        return extras.get(self.extra, lambda: out)()


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("", None), ("scores", "reads the router's scores"), ("index", "which experts are chosen"),
        ("weight", "reads p_weight"), ("table", "reads p_table"), ("twice", "another normal"),
        ("negative", "not be positive"), ("last", "reads the router's scores"),
        ("bias", None), ("raw", None), ("gathered", None), ("scaled", None),
        ("groups", "regroups the experts"), ("correction", "after they are normalised"),
        ("tokens", "not over the experts"),
    ],
)  # fmt: skip
def test_only_choices_may_read_a_router(extra: str, reason: str | None) -> None:
    program = torch.export.export(Router(extra), (torch.randn(3, 8),))
    first = next(iter(choices(program.graph).values()))
    assert first.refused is None if reason is None else reason in str(first.refused)
