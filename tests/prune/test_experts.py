"""Whole experts as units: masked equals sliced, files, scores, search, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from double import everything_in_double
from prune_cases import BASE, build, coupled
from prune_options import scored
from test_coupling_and_materialize import check
from torch import Tensor

import fxmem
from fxmem.errors import BudgetError
from fxmem.frontend.experts import streamable
from fxmem.prune.search.scores import METHODS
from fxmem.prune.units.masks import BLOCKS

SLOW = pytest.mark.slow


def mixture(name: str, attention: str = "sdpa") -> tuple[Any, fxmem.Coupling]:
    return build(name, attention), coupled(name, attention)


@pytest.fixture(scope="module")
def mixtral() -> tuple[Any, fxmem.Coupling]:
    return mixture("mixtral")


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, fxmem.Coupling]:
    return mixture("qwen3_moe")


def experts(units: fxmem.Coupling, *kept: tuple[int, ...], every: int = 1) -> fxmem.Masks:
    """Experts kept per layer, and every so-manieth unit of the other kinds."""
    names = [g.name for g in units.groups if g.kind == "experts"]
    rest = {g.name: tuple(range(0, g.size, every)) for g in units.groups if g.kind in BLOCKS}
    return fxmem.Masks.from_kept(units, {**rest, **dict(zip(names, kept, strict=True))})


def test_groups_of_a_mixture(mixtral: tuple[Any, fxmem.Coupling]) -> None:
    groups = [g for g in mixtral[1].groups if g.kind == "experts"]
    base = "model.layers.1.mlp."
    assert [(g.layer, g.size, g.least, g.cost) for g in groups] == [
        (i, 4, 2, 40 + 3 * 64 * 40) for i in (0, 1)
    ]
    assert groups[1].members == (
        (base + "gate.weight", 0, ()), (base + "experts.gate_up_proj", 0, ()),
        (base + "experts.down_proj", 0, ()),
    )  # fmt: skip
    assert groups[1].router == groups[1].members[:1]
    assert groups[1].consumer == groups[1].members[2:]


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=SLOW)])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_masked_equals_sliced(name: str, attention: str) -> None:
    with everything_in_double():
        model, units = mixture(name, attention)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for masks in (
            experts(units, (0, 2, 3), (0, 1, 2, 3)),
            experts(units, (1, 3), (2, 3)),  # as few as a token chooses
            experts(units, (0, 3), (1, 2, 3), every=3),  # gate, up and down cut along two axes
        ):
            small = check(model, units, masks)
            assert [m.num_experts for n, m in small.named_modules() if n.endswith("experts")] == [
                len(masks.kept(g.name)) for g in units.groups if g.kind == "experts"
            ]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_removed_experts_are_never_chosen(mixtral: tuple[Any, fxmem.Coupling]) -> None:
    """The oracle is the model whose removed experts do not matter at all."""
    model, units = mixtral
    masks = experts(units, (0, 2), (1, 2, 3))
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad(), fxmem.masked(model, masks, units):
        want = model(input_ids=ids).logits
        weight = model.model.layers[0].mlp.experts.down_proj
        kept = weight[1].clone()
        weight[1] = torch.nan
        assert torch.equal(model(input_ids=ids).logits, want)
        weight[1] = kept
        chosen = model(input_ids=ids, output_router_logits=True).router_logits
    assert chosen[0].topk(2).indices.unique().tolist() == [0, 2]


def test_masks_compose(qwen: tuple[Any, fxmem.Coupling]) -> None:
    model, units = qwen
    first = experts(units, (0, 1, 3), (1, 2, 3), every=2)
    small = fxmem.materialize(model, first, units)
    left = fxmem.coupling(small)
    assert [(g.size, g.least) for g in left.groups if g.kind == "experts"] == [(3, 2)] * 2
    second = experts(left, (0, 2), (0, 1), every=2)
    twice = fxmem.materialize(small, second)
    once = fxmem.materialize(model, second.after(first), units)
    assert all(
        torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True)
    )
    assert fxmem.coupling(twice) == fxmem.coupling(once)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_moe", marks=SLOW)])
def test_saved_model_loads_equal(name: str, tmp_path: Path) -> None:
    model, units = mixture(name)
    small: Any = fxmem.materialize(model, experts(units, (0, 2), (1, 2, 3), every=2), units)
    fxmem.save_pretrained(small, tmp_path)
    again: Any = fxmem.from_pretrained(tmp_path)
    ids = torch.randint(3, 97, (2, 9))
    tokens = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(small(input_ids=ids).logits, again(input_ids=ids).logits)
        assert torch.equal(small.generate(ids, **tokens), again.generate(ids, **tokens))
    assert again.model.layers[0].mlp.experts.num_experts == 2
    assert again.config._experts_implementation == "eager"
    assert fxmem.coupling(again) == fxmem.coupling(small)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_other_implementations_run(
    mixtral: tuple[Any, fxmem.Coupling], implementation: str
) -> None:
    model, units = mixtral
    small: Any = fxmem.materialize(model, experts(units, (0, 2), (1, 2, 3)), units).float()
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        want = small(input_ids=ids).logits
        with streamable(small, implementation):
            got = small(input_ids=ids).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_generate_and_sub_models(mixtral: tuple[Any, fxmem.Coupling]) -> None:
    model, units = mixtral
    masks = experts(units, (0, 2), (1, 2, 3), every=2)
    small: Any = fxmem.materialize(model, masks, units)
    ids = torch.randint(3, 97, (2, 6))
    run = fxmem.instantiate(model, masks, units, compile=False)
    options: Any = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), fxmem.masked(model, masks, units):
        want = model(input_ids=ids).logits
        tokens = model.generate(ids, **options)
    assert torch.equal(small.generate(ids, **options), tokens)
    with torch.no_grad():
        # Routers compute in float32.
        assert (run({"input_ids": ids}).logits - want).abs().max() < 1e-4 * want.abs().max()
        assert torch.equal(run({"input_ids": ids}).logits, small(input_ids=ids).logits)


def test_sparsity_counts_the_experts_of_a_token(mixtral: tuple[Any, fxmem.Coupling]) -> None:
    model, units = mixtral
    masks = experts(units, (0, 2), (1, 3))
    small = fxmem.materialize(model, masks, units)
    gone = masks.sparsity(units)
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert gone["parameters"] == pytest.approx(1 - left, abs=1e-12)
    attention = 40 * 40 * 2 + 20 * 40 * 2
    token = 2 * (attention + 4 * 40 + 2 * 3 * 64 * 40) + 97 * 40
    assert gone["macs"] == pytest.approx(2 * 2 * 40 / token, abs=1e-12)


def test_masks_of_earlier_versions_keep_all_experts(mixtral: tuple[Any, fxmem.Coupling]) -> None:
    """They do not name the experts, and still fit."""
    model, units = mixtral
    full = experts(units, (0, 1, 2, 3), (0, 1, 2, 3), every=2)
    named = tuple(e for e in full.entries if not e[0].endswith("mlp.experts"))
    old = fxmem.Masks.from_json(fxmem.Masks(full.model, named).to_json())
    assert old.on(units) == full and full.on(units) is full
    fxmem.instantiate(model, experts(units, (0, 2), (1, 2, 3)), units, compile=False)
    ids = torch.randint(3, 97, (2, 6))
    with torch.no_grad(), fxmem.masked(model, old, units):
        want = model(input_ids=ids).logits
    with torch.no_grad():
        for run in (
            fxmem.instantiate(model, old, units, compile=False),
            lambda batch: fxmem.materialize(model, old, units)(**batch),
        ):
            assert (run({"input_ids": ids}).logits - want).abs().max() < 1e-10


def data(model: Any, count: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 97, (3, 11), generator=g) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


@pytest.mark.parametrize("method", METHODS)
def test_a_silent_expert_scores_lowest(method: str) -> None:
    model, units = mixture("qwen3_moe")
    with torch.no_grad():
        for layer, silent in zip(model.model.layers, (1, 2), strict=True):
            layer.mlp.experts.down_proj[silent] = 0
    options = fxmem.Prune(keep=0.75, kinds=("experts",))
    values, masks = fxmem.score(model, data(model), method, options, coupled=units)
    assert {len(v) for v in values.values()} == {4} and all((v >= 0).all() for v in values.values())
    assert masks.sparsity(units)["prunable"] > 0
    if method != "random":
        assert [int(v.argmin()) for v in values.values()] == [1, 2]
        left = [masks.kept(g.name) for g in units.groups if g.kind == "experts"]
        assert left == [(0, 2, 3), (0, 1, 3)]


@pytest.mark.parametrize("kinds", [("experts",), ("experts", "kv_groups"), ()])
def test_search(qwen: tuple[Any, fxmem.Coupling], kinds: tuple[str, ...]) -> None:
    model, units = qwen
    options = scored(keep=0.7, kinds=kinds, steps=3, samples=2, age=2, block=8)
    masks = fxmem.search(model, data(model), options, coupled=units)
    whole = [g for g in units.groups if g.kind in (kinds or ("kv_groups", "mlp_channels"))]
    cost = sum(g.cost * len(masks.kept(g.name)) for g in whole)
    assert 0 < cost <= 0.7 * sum(g.cost * g.size for g in whole)
    assert all(len(masks.kept(g.name)) >= g.least for g in units.groups)
    assert bool(torch.isfinite(fxmem.materialize(model, masks, units)(**data(model)[0]).loss))


def test_refusals(qwen: tuple[Any, fxmem.Coupling]) -> None:
    model, units = qwen
    with pytest.raises(fxmem.MaskError, match="chooses 2.*layers.1.mlp.*layer 1"):
        experts(units, (0, 1), (3,))
    whole = fxmem.Masks.full(units)
    groups = tuple(
        (n, k, (0,) if n == "model.layers.0.mlp.experts" else u) for n, k, u in whole.entries
    )
    with pytest.raises(fxmem.MaskError, match="chooses 2"):
        fxmem.materialize(model, fxmem.Masks(whole.model, groups), units)
    both = fxmem.Prune(kinds=("experts", "mlp_channels"))
    with pytest.raises(fxmem.PlanError, match="'experts' and 'mlp_channels'"):
        fxmem.search(model, data(model), both, coupled=units)
    few = fxmem.Prune(keep=0.4, kinds=("experts",))
    with pytest.raises(BudgetError, match="fewer than 2 experts"):
        fxmem.search(model, data(model), few, coupled=units)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("Glm4Moe", {"n_routed_experts": 6, "first_k_dense_replace": 0}, "corrects the router"),
        ("Phimoe", {"num_local_experts": 6}, "needs the axis whole"),
    ],
)  # fmt: skip
def test_other_routing_is_refused_with_the_reason(
    config: str, options: dict[str, Any], reason: str
) -> None:
    values = {**BASE, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **options}
    made = getattr(T, f"{config}Config")(**values)
    units = fxmem.coupling(getattr(T, f"{config}ForCausalLM")(made).eval())
    assert not [g for g in units.groups if g.kind == "experts"]
    rows = [w for n, i, w in units.blocked if i == 0 and n.endswith(("gate.weight", "r.weight"))]
    assert any(reason in why for why in rows)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["GptOss", "Qwen2Moe", "Olmoe", "GraniteMoe"])
def test_others_are_exact(config: str) -> None:
    counts = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2}
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32}
    torch.manual_seed(0)
    made = getattr(T, f"{config}Config")(**{**BASE, **counts, **sizes})
    made._attn_implementation = made._experts_implementation = "eager"
    with everything_in_double():
        model = getattr(T, f"{config}ForCausalLM")(made).double().eval()
        units = fxmem.coupling(model)
        check(model, units, experts(units, (0, 2, 5), (1, 2, 3, 4), every=3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_smaller_model_streams(name: str) -> None:
    with everything_in_double():
        model, units = mixture(name)
        masks = experts(units, (0, 2), (1, 2, 3), every=2)
        ids = torch.randint(3, 97, (2, 16))
        plan = fxmem.Plan(stream=fxmem.Stream(chunk=4, loss_chunk=4), prune=masks)
        plain: Any = fxmem.transform(model, fxmem.Plan(prune=masks))
        streamed: Any = fxmem.transform(model, plan)
        for m in (plain, streamed):
            m.train()
            m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-10 * max(1.0, float(a.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_widths_run_where_grouped_products_cannot(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers' default implementation reads rows at multiples of 16 bytes only."""
    net: Any = tiny.model("mixtral", default_experts=True)
    net.config._experts_implementation = "grouped_mm"
    units = fxmem.coupling(net)
    ids = torch.randint(tiny.VOCAB, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    inner = [g for g in units.groups if g.kind == "mlp_channels"]
    even, odd = (
        fxmem.Masks.from_kept(units, {g.name: tuple(range(g.size - n)) for g in inner})
        for n in (8, 3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fxmem.materialize(net, even, units).config._experts_implementation == "grouped_mm"
    with pytest.warns(fxmem.FxmemWarning, match='experts run as experts_implementation="eager"'):
        small: Any = fxmem.materialize(net, odd, units)
    small = small.to(dtype).train()
    loss = small(**batch).loss
    loss.backward()
    assert net.config._experts_implementation == "grouped_mm"
    with fxmem.masked(net, odd, units), torch.no_grad():
        want = net(**batch).loss
    near = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(loss.float(), want, rtol=near, atol=0)
    with torch.no_grad():
        made = fxmem.instantiate(net, odd, units, compile=False)(batch).loss
    torch.testing.assert_close(made, want, rtol=1e-5, atol=0)
    fxmem.save_pretrained(small, tmp_path)
    loaded = fxmem.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss.float(), loss.float(), rtol=near, atol=0)
