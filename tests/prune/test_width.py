"""The residual width as a unit: norms are rescaled so that smaller models equal the masked ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from double import everything_in_double
from prune_cases import CASES, build, coupled
from test_coupling_and_materialize import check as check_equal
from torch import Tensor, nn

import fxmem

LAYER_NORM = ("gpt2", "opt")
MATRIX = [
    pytest.param(name, kind, marks=() if (name, kind) == ("llama", "sdpa") else pytest.mark.slow)
    for name in CASES
    for kind in ("sdpa", "eager")
    if name not in LAYER_NORM and (name, kind) != ("gemma2", "sdpa")
]


@pytest.fixture(autouse=True)
def double(request: pytest.FixtureRequest) -> Iterator[None]:
    """Norms average in float32 by name: sums over D and over D' would differ by its rounding.

    Tests of files compare one model with itself, loaded as any program would.
    """
    if "tmp_path" in request.fixturenames:
        yield
        return
    with everything_in_double():
        yield


@pytest.fixture(scope="module")
def llama() -> tuple[Any, fxmem.Coupling]:
    return build("llama"), coupled("llama")


def width(units: fxmem.Coupling) -> fxmem.UnitGroup:
    return next(g for g in units.groups if g.kind == "width")


def drawn(units: fxmem.Coupling, keep: float, everything: bool = False) -> fxmem.Masks:
    groups = units.groups if everything else (width(units),)
    bools = {g.name: torch.rand(g.size) < keep for g in groups}
    for b in bools.values():
        b[1:3] = True
    bools[width(units).name][0] = False
    return fxmem.Masks.from_bools(units, bools)


def factors(units: fxmem.Coupling, masks: fxmem.Masks) -> dict[str, float]:
    """Norm weight -> sqrt(D / D'): its gradient is that much smaller in the smaller model."""
    g = width(units)
    return {n.parameter: (g.size / len(masks.kept(g.name))) ** 0.5 for n in g.norms}


def check(model: Any, units: fxmem.Coupling, masks: fxmem.Masks) -> Any:
    """As for other units, and a sub-model of a search gives the same."""
    small: Any = check_equal(model, units, masks, factors(units, masks))
    ids = torch.randint(3, 97, (3, 11))
    with torch.no_grad(), fxmem.masked(model, masks, units):
        want = model(input_ids=ids).logits
    run = fxmem.instantiate(model, masks, units, compile=False)
    with torch.no_grad():
        assert (run({"input_ids": ids}).logits - want).abs().max() < 1e-10
    return small


@pytest.mark.parametrize(("name", "attention"), MATRIX)
def test_masked_equals_sliced(name: str, attention: str) -> None:
    model: Any = build(name, attention)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    eps = [v for m in model.modules() for v in vars(m).values() if type(v) is float]
    units = fxmem.coupling(model)
    group = width(units)
    small = check(model, units, drawn(units, 0.6))
    tied = model.config.tie_word_embeddings
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    check(model, units, drawn(units, 0.5, everything=True))
    check(model, units, fxmem.Masks.from_kept(units, {group.name: (7,)}))
    none = fxmem.Masks.from_kept(units, {group.name: ()})
    ids = torch.randint(3, 97, (2, 5))
    empty: Any = fxmem.materialize(model, none, units)
    with torch.no_grad(), fxmem.masked(model, none, units):
        assert torch.equal(empty(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert eps == [v for m in model.modules() for v in vars(m).values() if type(v) is float]


def test_without_the_rescale_it_differs(
    llama: tuple[Any, fxmem.Coupling], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, units = llama
    masks = drawn(units, 0.5)
    ids = torch.randint(3, 97, (2, 9))
    small: Any = fxmem.materialize(model, masks, units)
    monkeypatch.setattr("fxmem.prune.shrink.materialize.rescale", lambda *_: None)
    monkeypatch.setattr("fxmem.prune.shrink.materialize.set_epsilons", lambda *_: None)
    naive: Any = fxmem.materialize(model, masks, units)
    with torch.no_grad():
        assert (naive(input_ids=ids).logits - small(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", LAYER_NORM)
def test_layer_norm_blocks_the_width(name: str) -> None:
    units = coupled(name)
    assert "width" not in [g.kind for g in units.groups]
    why = [w for n, axis, w in units.blocked if "embed_tokens" in n or "wte" in n if axis == 1]
    assert len(why) == 1 and "mean of a LayerNorm includes removed channels" in why[0]
    with pytest.raises(fxmem.FxmemError, match="no units of kind 'width'"):
        fxmem.search(build(name), [], fxmem.Prune(kinds=("width",)), coupled=units)


class Tiny(nn.Module):
    """A model with torch's own RMSNorm, or a variant of it."""

    def __init__(self, variant: str = "plain") -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 12), nn.Linear(12, 97)
        self.norm = nn.RMSNorm(12, eps=1e-5, elementwise_affine=variant != "bare")
        if variant == "no eps":
            self.norm.eps = None
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.variant = variant
        if variant != "bare":
            nn.init.normal_(self.norm.weight)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        x = self.embed(input_ids)
        if self.variant == "shift":
            x = x.cos()
        if self.variant == "softmax":
            x = x.softmax(-1)
        x = self.norm(x + self.down(self.up(x).relu()))
        if self.variant == "weight elsewhere":
            x = x + self.norm.weight
        return CausalLMOutput(logits=self.head(x))


def test_norm_of_torch() -> None:
    torch.manual_seed(0)
    model = Tiny().double().eval()
    units = fxmem.coupling(model)
    assert [n[:4] for n in width(units).norms] == [("norm.weight", False, "norm", "eps")]
    check(model, units, drawn(units, 0.5))


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("bare", "no float|no weight|needs the axis whole"),
        ("no eps", "needs the axis whole"),
        ("shift", "not zero when removed"),
        ("softmax", "softmax"),
        ("weight elsewhere", "used elsewhere"),
    ],
)
def test_what_is_not_exact_is_refused(variant: str, reason: str) -> None:
    units = fxmem.coupling(Tiny(variant).double().eval())
    assert "width" not in [g.kind for g in units.groups]
    assert any(re.search(reason, why) for n, _, why in units.blocked if n == "embed.weight")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of one more multiplication per norm weight."""
    return torch.allclose(a, b, rtol=1e-15 * 4, atol=0)


def test_masks_compose(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    first = drawn(units, 0.7, everything=True)
    small: Any = fxmem.materialize(model, first, units)
    second = drawn(fxmem.coupling(small), 0.5, everything=True)
    twice: Any = fxmem.materialize(small, second)
    once: Any = fxmem.materialize(model, second.after(first), units)
    weights = factors(units, first)
    pairs = zip(once.named_parameters(), twice.parameters(), strict=True)
    assert all(same(a, b) if n in weights else torch.equal(a, b) for (n, a), b in pairs)
    assert [m.variance_epsilon for m in twice.modules() if hasattr(m, "variance_epsilon")] == [
        m.variance_epsilon for m in once.modules() if hasattr(m, "variance_epsilon")
    ]
    assert fxmem.coupling(twice) == fxmem.coupling(once)
    check(model, units, second.after(first))


def test_masks_without_a_width_entry(llama: tuple[Any, fxmem.Coupling]) -> None:
    """Masks written before there was a width: it is whole."""
    model, units = llama
    full = fxmem.Masks.full(units)
    old = fxmem.Masks(full.model, tuple(e for e in full.entries if e[0] != "width"))
    small = fxmem.materialize(model, old, units)
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]
    narrow = drawn(units, 0.5)
    for masks in (narrow.after(old), old.after(narrow)):
        assert masks.on(units) == narrow
    assert old.sparsity(units) == full.sparsity(units) and old.rounded(units, 8) == full


def test_sparsity(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    masks = drawn(units, 0.5, everything=True)
    small = fxmem.materialize(model, masks, units)
    found = masks.sparsity(units)
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert found["parameters"] == found["bytes"] == found["prunable"]
    assert found["parameters"] == pytest.approx(1 - left, abs=1e-12)
