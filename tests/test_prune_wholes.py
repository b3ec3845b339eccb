"""Whole blocks and layers: removed exactly, found by the search, refused where they overlap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prune_cases import build
from test_prune import check

import fxmem

IDS = torch.randint(3, 97, (4, 2, 11), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": x, "labels": x} for x in IDS]


def shape(masks: fxmem.Masks) -> dict[str, bool]:
    """Group name -> kept, where every group is kept or removed as a whole; without the width."""
    assert all(kept in (0, size) for kept, size in masks.counts.values())
    return {name: kept > 0 for name, (kept, _) in masks.counts.items() if name != "width"}


@pytest.fixture(scope="module")
def llama() -> tuple[Any, fxmem.Coupling]:
    model = build("llama")
    return model, fxmem.coupling(model)


@pytest.mark.parametrize(
    "paths", [("model.layers.1",), ("model.layers.0.mlp",), ("model.layers.0.self_attn", "model")]
)
def test_modules_are_removed_exactly(llama: Any, paths: tuple[str, ...]) -> None:
    model, units = llama
    masks = fxmem.Masks.without(units, *paths)
    gone = {name for name, kept in shape(masks).items() if not kept}
    assert gone == {g.name for g in units.groups[:-1] if any(p + "." in g.name for p in paths)}
    check(model, units, masks)


def test_a_removed_layer_is_skipped(llama: Any) -> None:
    model, units = llama
    small: Any = fxmem.materialize(model, fxmem.Masks.without(units, "model.layers.1"), units)
    with torch.no_grad():
        before = model.model.norm
        seen: list[torch.Tensor] = []
        hook = model.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out))
        model(input_ids=IDS[0])
        hook.remove()
        first = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
        want = model.lm_head(before(first))
        assert (small(input_ids=IDS[0]).logits - want).abs().max() < 1e-10


def test_unknown_modules_are_named(llama: Any) -> None:
    with pytest.raises(fxmem.MaskError, match=r"model\.layers\.9"):
        fxmem.Masks.without(llama[1], "model.layers.9")
    with pytest.raises(fxmem.MaskError, match="layers.1"):
        fxmem.Masks.without(llama[1], "model.layers.1.self_att")


KINDS = [("layers",), ("attention_blocks", "mlp_blocks"), ("attention_blocks", "mlp_channels")]


@pytest.mark.parametrize("kinds", KINDS)
def test_search_over_wholes(llama: Any, kinds: tuple[str, ...]) -> None:
    model, units = llama
    options = fxmem.Prune(keep=0.6, kinds=kinds, steps=4, block=8, init_batches=2)
    masks = fxmem.search(model, BATCHES, options, coupled=units)
    assert masks.sparsity(units)["prunable"] >= 0.4
    whole = [g.name for g in units.groups if kinds[-1] != "mlp_channels" or g.kind == "kv_groups"]
    assert all(masks.counts[name][0] in (0, masks.counts[name][1]) for name in whole)
    if kinds == ("layers",):
        kept = shape(masks)
        assert sorted(kept.values()) == [False, False, True, True]
        assert len({g.layer for g in units.groups if kept.get(g.name)}) == 1
    for method in ("magnitude", "wanda", "taylor", "random"):
        _, scored = fxmem.score(model, BATCHES, method, options, coupled=units)
        assert scored.sparsity(units)["prunable"] >= 0.4


@pytest.mark.parametrize("init", ["wanda", "taylor", "uniform"])
def test_a_redundant_layer_is_found(init: Any) -> None:
    model: Any = build("llama")
    with torch.no_grad():
        for module in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            module.weight.zero_()
    dense = model(input_ids=IDS[0]).logits
    # What the model itself says, so that a layer with a say is missed.
    said = [model(input_ids=x).logits.argmax(-1) for x in IDS]
    batches = [
        {"input_ids": x, "labels": torch.cat([x[:, :1], y[:, :-1]], 1)}
        for x, y in zip(IDS, said, strict=True)
    ]
    options = fxmem.Prune(keep=0.5, kinds=("layers",), steps=20, init=init, lr=0.2)
    masks = fxmem.search(model, batches, options)
    assert masks == fxmem.Masks.without(fxmem.coupling(model), "model.layers.0")
    small: Any = fxmem.materialize(model, masks)
    assert (small(input_ids=IDS[0]).logits - dense).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("kinds", "what"),
    [
        (("layers", "kv_groups"), "'layers' and 'kv_groups' both remove"),
        (("mlp_channels", "mlp_blocks"), "both remove"),
        (("neurons",), "kinds it has: kv_groups, mlp_channels, .*layers"),
    ],
)
def test_overlapping_and_unknown_kinds(llama: Any, kinds: tuple[str, ...], what: str) -> None:
    with pytest.raises(fxmem.PlanError, match=what):
        fxmem.search(llama[0], BATCHES, fxmem.Prune(kinds=kinds), coupled=llama[1])
