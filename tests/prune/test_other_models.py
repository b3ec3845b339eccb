"""Encoders, encoder-decoders and models of your own: ids first, logits returned; others are refused
by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

import fxmem
from fxmem.errors import CaptureError
from fxmem.prune.coupling.calls import logits


class Block(nn.Module):
    """Attention whose number of heads is an attribute of its own, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            f(h).view(*h.shape[:2], self.n_head, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.o(a.flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Own(nn.Module):
    """A language model as people write them; `named` returns an object with logits."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(24, 50)
        self.blocks = nn.ModuleList(Block(24, 4) for _ in range(2))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x)
        found = self.head(x)
        return Output(found) if self.named else found


class Output:
    def __init__(self, found: Tensor) -> None:
        self.logits = found


@pytest.mark.parametrize("named", [False, True])
def test_a_model_of_your_own_becomes_smaller(named: bool) -> None:
    model = Own(named).double().eval()
    units = fxmem.coupling(model)
    assert [g.kind for g in units.groups] == ["kv_groups", "mlp_channels"] * 2
    kept = {g.name: tuple(range(1, g.size, 2)) for g in units.groups}
    masks = fxmem.Masks.from_kept(units, kept)
    small: Any = fxmem.materialize(model, masks, units)
    ids = torch.arange(22).view(2, 11)
    with torch.no_grad():
        with fxmem.masked(model, masks, units):
            want = model(ids)
        got = small(ids)
    want, got = (x.logits if named else x for x in (want, got))
    assert (got - want).abs().max() < 1e-10
    assert small.blocks[0].q.weight.shape == (12, 24) and small.blocks[0].n_head == 2


SHAPE: dict[str, Any] = {"vocab_size": 60, "max_position_embeddings": 40, "initializer_range": 0.3}
BERT: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40
}  # fmt: skip
BART: dict[str, Any] = {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))
}
CASES: dict[str, Any] = {
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**SHAPE, **BERT)),
    "classifier": lambda: T.BertForSequenceClassification(T.BertConfig(**SHAPE, **BERT)),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=60, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    ),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(d_model=24, **SHAPE, **BART)),
}


@pytest.mark.parametrize("name", CASES)
def test_encoders_and_encoder_decoders_become_smaller(name: str, tmp_path: Path) -> None:
    model = CASES[name]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    units = fxmem.coupling(model)
    assert {g.kind for g in units.groups} >= {"kv_groups", "mlp_channels"}
    inner = [g for g in units.groups if g.kind != "width"]
    masks = fxmem.Masks.from_kept(units, {g.name: tuple(range(1, g.size, 2)) for g in inner})
    small: Any = fxmem.materialize(model, masks, units)
    ids = torch.arange(22).view(2, 11) + 3
    with torch.no_grad():
        with fxmem.masked(model, masks, units):
            want = logits(model, ids)
        got = logits(small, ids)
        assert (got - want).abs().max() < 1e-10
        small.save_pretrained(tmp_path)
        assert torch.equal(logits(fxmem.from_pretrained(tmp_path), ids), got)
    cut = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert cut < 0.8


class Pairs(Own):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        return [super().forward(idx)]


@pytest.mark.parametrize(
    ("model", "message"),
    [(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "no embedding"), (Pairs(False), "no logits")],
)
def test_others_are_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=f"{type(model).__name__} .*{message}.*token ids"):
        fxmem.coupling(model)
