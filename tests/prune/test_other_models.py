"""Encoders, encoder-decoders and models of your own: ids first, logits returned; Falcon, Mamba."""

from __future__ import annotations

import copy
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
from fxmem.prune.units.masks import consumer_keeps


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


class Silent(Own):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        return str(super().forward(idx))


def test_a_model_that_returns_nothing_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="Silent returns no logits and no other tensor"):
        fxmem.coupling(Silent(False))


FALCON: dict[str, Any] = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_hidden_size=48
)
STATE: dict[str, Any] = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2
)
OTHERS: dict[str, Any] = {
    # one K/V head in the same matrix as the queries, picked by lists of positions
    "falcon": (lambda: T.FalconForCausalLM(T.FalconConfig(**FALCON)), [4, 48]),
    "falcon of today": (
        lambda: T.FalconForCausalLM(
            T.FalconConfig(num_kv_heads=2, new_decoder_architecture=True, **FALCON)
        ),
        [2, 48],
    ),
    # weights that are multiplied without a call of their module, units of hardly any effect
    "mamba": (lambda: T.MambaForCausalLM(T.MambaConfig(**STATE)), [32, 2]),
}


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", OTHERS)
def test_units_that_were_lost_or_wrong(name: str, double: bool) -> None:
    make, sizes = OTHERS[name]
    torch.manual_seed(0)
    model = make().eval()
    model = model.double() if double else model
    units = fxmem.coupling(model)
    inner = [g for g in units.groups if g.kind != "width"]
    assert [g.size for g in inner] == sizes
    ids = torch.arange(22).view(2, 11) + 3
    for group in inner:
        masks = fxmem.Masks.from_kept(units, {group.name: tuple(range(1, group.size, 2))})
        small = fxmem.materialize(model, masks, units)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for (at, axis), keep in consumer_keeps(units, masks).items():
                twin.get_parameter(at).movedim(axis, -1)[..., ~keep] = 0
            with fxmem.masked(model, masks, units):
                want = logits(model, ids)
            for got in (logits(small, ids), logits(twin, ids)):
                assert (got - want).abs().max() < (1e-10 if double else 1e-6)


def test_what_stays_whole_is_said() -> None:
    class Summed(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(self.norm(x))
            return x + self.down(h) + h.sum(-1, keepdim=True)

    model = Own(False)
    model.blocks = nn.ModuleList(Summed(24, 4) for _ in range(2))
    units = fxmem.coupling(model)
    assert "blocks.*.up.weight" in units.left_out and not units.groups
    said = pytest.warns(fxmem.FxmemWarning, match=r"blocks\.\*.* stay whole.*sum")
    with said, pytest.raises(fxmem.PlanError, match="without batches"):
        fxmem.search(model, [], fxmem.Prune())
