"""Whole attention blocks, MLP blocks and layers: masks, exactness, search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from double import everything_in_double
from prune_cases import BASE, CASES, build, coupled
from prune_options import scored
from test_coupling_and_materialize import check
from torch import Tensor

import fxmem
from fxmem.prune.search.scores import METHODS
from fxmem.prune.search.space import Space, standardise
from fxmem.prune.units.kinds import chosen
from fxmem.prune.units.masks import BLOCKS

SLOW = pytest.mark.slow
FAST = ("llama", "mixtral")
WHOLE = {"attention_blocks", "mlp_blocks", "layers"}


def llama(layers: int = 4) -> tuple[Any, fxmem.Coupling]:
    torch.manual_seed(0)
    config = T.LlamaConfig(**{**BASE, "num_hidden_layers": layers, "initializer_range": 0.1})
    model = T.LlamaForCausalLM(config).double().eval()
    return model, fxmem.coupling(model)


@pytest.fixture(scope="module")
def deep() -> tuple[Any, fxmem.Coupling]:
    return llama()


def data(count: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 97, (3, 11), generator=g) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def gone(masks: fxmem.Masks) -> set[str]:
    return {name for name, (kept, _) in masks.counts.items() if not kept}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else SLOW) for n in CASES if n not in ("gpt2", "opt")],
)
def test_without_equals_masked(name: str) -> None:
    """A block, a layer, everything; GPT-2 and OPT, which keep a silent unit, are below."""
    with everything_in_double():
        attention = "eager" if name == "gemma2" else "sdpa"
        model, units = build(name, attention), coupled(name, attention)
        attention = next(g.name for g in units.groups if g.kind == "kv_groups")
        for paths in ([attention.rpartition(".")[0]], ["model.layers.1"], ["model"]):
            masks = fxmem.Masks.without(units, *paths)
            assert all(any(n.startswith(f"{p}.") for p in paths) for n in gone(masks))
            check(model, units, masks)


def test_a_layer_without_blocks_is_the_identity(deep: tuple[Any, fxmem.Coupling]) -> None:
    """No bias: what is left of the layer adds nothing, so the model has one layer less."""
    model, units = deep
    small: Any = fxmem.materialize(model, fxmem.Masks.without(units, "model.layers.2"), units)
    ids = data()[0]["input_ids"]
    with torch.no_grad():
        got = small(input_ids=ids).logits
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList([layers[i] for i in (0, 1, 3)])
        want = model(input_ids=ids, use_cache=False).logits
        model.model.layers = layers
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) for n in ("gpt2", "opt", "qwen2")])
def test_the_output_bias_stays(name: str) -> None:
    model: Any = build(name)
    units = fxmem.coupling(model)
    base = {"gpt2": "transformer.h.1", "opt": "model.decoder.layers.1"}.get(name, "model.layers.1")
    masks = fxmem.Masks.without(units, base)
    assert len(gone(masks)) == 2
    small: Any = fxmem.materialize(model, masks, units)
    ids = data()[0]["input_ids"]
    with torch.no_grad(), fxmem.masked(model, masks, units):
        want = model(input_ids=ids).logits
    with torch.no_grad():
        assert (small(input_ids=ids).logits - want).abs().max() < 1e-10
        biases = [p for n, p in small.named_parameters() if n.startswith(base)]
        before = [p for n, p in model.named_parameters() if n.startswith(base)]
        same = [a.shape == b.shape for a, b in zip(biases, before, strict=True)]
    assert any(same)


def test_paths(deep: tuple[Any, fxmem.Coupling]) -> None:
    units = deep[1]
    masks = fxmem.Masks.without(units, "model.layers.3", "model.layers.0.self_attn")
    assert gone(masks) == {
        "model.layers.0.self_attn.kv_groups", "model.layers.3.self_attn.kv_groups",
        "model.layers.3.mlp.mlp_channels",
    }  # fmt: skip
    assert fxmem.Masks.without(units) == fxmem.Masks.full(units)
    for path in ("model.layers.9", "model.layer", "model.norm", ""):
        with pytest.raises(fxmem.MaskError, match="removed as a block.*layers.0.mlp"):
            fxmem.Masks.without(units, path)


def test_an_expert_block_loses_its_channels() -> None:
    units = coupled("qwen3_moe")
    masks = fxmem.Masks.without(units, "model.layers.1.mlp")
    assert gone(masks) == {"model.layers.1.mlp.experts.mlp_channels"}
    assert masks == fxmem.Masks.without(units, "model.layers.1.mlp.experts")
    with pytest.raises(fxmem.MaskError, match="removed as a block"):
        fxmem.Masks.without(units, "model.layers.1.mlp.gate")


def test_compose_and_save(deep: tuple[Any, fxmem.Coupling], tmp_path: Path) -> None:
    model, units = deep
    first = fxmem.Masks.without(units, "model.layers.1")
    small: Any = fxmem.materialize(model, first, units)
    left = fxmem.coupling(small)
    second = fxmem.Masks.without(left, "model.layers.2.mlp")
    twice: Any = fxmem.materialize(small, second)
    once: Any = fxmem.materialize(model, second.after(first), units)
    fxmem.save_pretrained(twice, tmp_path)
    again: Any = fxmem.from_pretrained(tmp_path)
    ids = data()[0]["input_ids"]
    with torch.no_grad():
        want = once(input_ids=ids).logits
        assert torch.equal(twice(input_ids=ids).logits, want)
        assert torch.equal(again(input_ids=ids).logits, want)
    tokens = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(once.generate(ids, **tokens), again.generate(ids, **tokens))


@pytest.mark.parametrize(
    "kinds",
    [("layers",), ("attention_blocks", "mlp_blocks"), ("attention_blocks", "mlp_channels")],
)
def test_search_ends_at_a_mask_of_whole_blocks(
    deep: tuple[Any, fxmem.Coupling], kinds: tuple[str, ...]
) -> None:
    model, units = deep
    options = scored(keep=0.6, kinds=kinds, steps=4, samples=2, age=2, block=8)
    seen: list[Any] = []
    masks = fxmem.search(model, data(), options, callback=seen.append, coupled=units)
    space = seen[-1].space
    assert len(space.cost) == {"layers": 4, "mlp_blocks": 8, "mlp_channels": 4 + 4 * 9}[kinds[-1]]
    assert space.budget_base == sum(g.cost * g.size for g in units.groups if g.kind in BLOCKS)
    kept = sum(g.cost * len(masks.kept(g.name)) for g in units.groups if g.kind in BLOCKS)
    assert 0.3 * space.budget_base < kept <= 0.6 * space.budget_base
    for name, (count, size) in masks.counts.items():
        assert count in (0, size) or (kinds[-1] == "mlp_channels" and "mlp" in name)
    if kinds == ("layers",):
        pairs = [(f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp") for i in range(4)]
        lost = {name.rpartition(".")[0] for name in gone(masks)}
        assert lost and all((a in lost) == (b in lost) for a, b in pairs)
    assert bool(torch.isfinite(fxmem.materialize(model, masks, units)(**data()[0]).loss))


@pytest.mark.parametrize("init", ["uniform", "wanda"])
def test_a_redundant_layer_goes_first(init: Any) -> None:
    model, units = llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(10)
        batches = data(4)
        for batch in batches:  # the model's own choices: without the others it finds them less
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, 1:] = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
    options = scored(
        keep=0.75, kinds=("layers",), steps=20, samples=8, age=1, init=init, init_batches=2,
        epsilon=0.02,
    )  # fmt: skip
    masks = fxmem.search(model, batches, options, coupled=units)
    assert masks == fxmem.Masks.without(units, "model.layers.2")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kinds", [("layers",), ("attention_blocks", "mlp_blocks")])
def test_scores(deep: tuple[Any, fxmem.Coupling], kinds: tuple[str, ...], method: str) -> None:
    model, units = deep
    options = fxmem.Prune(keep=0.6, kinds=kinds)
    values, masks = fxmem.score(model, data(), method, options, coupled=units)
    assert gone(masks) and all(kept in (0, size) for kept, size in masks.counts.values())
    space = Space.build(chosen(units, kinds), options.settings(), values)
    pooled = space.pool(standardise(space, values, method))
    per_block = space.pool({g.name: values[g.name] / g.cost for g in space.groups})
    if method == "taylor":  # a change of the loss per parameter
        assert torch.allclose(pooled, per_block)
    elif kinds != ("layers",):  # the ranking among blocks of one kind is that per parameter
        for kind in (0, 1):
            assert torch.equal(pooled[kind::2].argsort(), per_block[kind::2].argsort())


@pytest.mark.parametrize("ranking", ["joint", "kind"])
def test_each_kind_of_block_may_have_its_own_budget(
    deep: tuple[Any, fxmem.Coupling], ranking: Any
) -> None:
    model, units = deep
    options = fxmem.Prune(
        keep=0.5,
        kinds=("attention_blocks", "mlp_blocks"),
        advanced={"ranking": ranking, "cost": "units"},
    )
    _, masks = fxmem.score(model, data(), "magnitude", options, coupled=units)
    lost = gone(masks)
    assert len(lost) == 4
    assert ranking == "joint" or sum("self_attn" in name for name in lost) == 2


def test_blocks_of_a_mixture() -> None:
    model = build("qwen3_moe")
    options = fxmem.Prune(keep=0.5, kinds=("mlp_blocks",), advanced={"cost": "units"})
    units = coupled("qwen3_moe")
    _, masks = fxmem.score(model, data(), "wanda", options, coupled=units)
    assert len(gone(masks)) == 1 and "mlp.experts.mlp_channels" in str(gone(masks))


def test_overlaps_and_unknown_kinds_are_named(deep: tuple[Any, fxmem.Coupling]) -> None:
    model, units = deep
    for first, second in (
        ("layers", "kv_groups"), ("layers", "mlp_blocks"), ("attention_blocks", "kv_groups"),
        ("mlp_channels", "mlp_blocks"),
    ):  # fmt: skip
        with pytest.raises(fxmem.PlanError, match=f"'{first}' and '{second}' both remove"):
            fxmem.search(model, data(), fxmem.Prune(kinds=(first, second)), coupled=units)
    mixture = coupled("mixtral")
    for kind in ("mlp_blocks", "layers"):
        with pytest.raises(fxmem.PlanError, match=f"'experts' and '{kind}'"):
            chosen(mixture, ("experts", kind))
    with pytest.raises(fxmem.PlanError, match="kind 'experts'") as found:
        fxmem.score(model, data(), "random", fxmem.Prune(kinds=("experts",)), coupled=units)
    assert set(str(found.value).split("kinds it has: ")[1].split(", ")) > WHOLE
