"""Coupling, masks, and smaller models that equal the masked ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from double import everything_in_double
from prune_cases import CASES, build, coupled
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fxmem
from fxmem.prune.shrink import size_attributes as attributes
from fxmem.prune.shrink.slicing import cut, slices

FAST = ("llama",)
MIXTURES = ("mixtral", "qwen3_moe")
MATRIX = [
    pytest.param(name, kind, marks=() if name in FAST and kind == "sdpa" else pytest.mark.slow)
    for name in CASES
    for kind in ("sdpa", "eager")
    if (name, kind) != ("gemma2", "sdpa")  # transformers has no sdpa for it
]


def inner(units: fxmem.Coupling) -> list[fxmem.UnitGroup]:
    """Units inside layers; the width, which all layers share, has tests of its own."""
    return [g for g in units.groups if g.kind != "width"]


def drawn(units: fxmem.Coupling, keep: float) -> fxmem.Masks:
    bools = {g.name: torch.rand(g.size) < keep for g in inner(units)}
    for group in inner(units):
        bools[group.name][: max(1, group.least)] = True
    return fxmem.Masks.from_bools(units, bools)


def loss(logits: Tensor) -> Tensor:
    return (logits.logsumexp(-1) - logits[..., 3]).square().mean()


def check(
    model: Any, units: fxmem.Coupling, masks: fxmem.Masks, factor: Mapping[str, float] | None = None
) -> Any:
    """Logits and gradients of kept entries equal the masked model's, and the mask matters.

    ``factor``: parameter -> what its gradient in the smaller model is multiplied with, if not 1.
    """
    factor = factor or {}
    ids = torch.randint(3, 97, (3, 11))
    small = fxmem.materialize(model, masks, units)
    model.zero_grad()
    with fxmem.masked(model, masks, units):
        want = model(input_ids=ids).logits
        loss(want).backward()
    got = small(input_ids=ids).logits
    loss(got).backward()
    assert (got - want).abs().max() < 1e-10
    with torch.no_grad():
        assert (model(input_ids=ids).logits - want).abs().max() > 1e-3
    parts = slices(units, masks)
    top = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        if p.grad is None:
            continue
        kept = cut(p.grad, parts.get(name, []))
        new = torch.zeros_like(kept) if q.grad is None else q.grad * factor.get(name, 1.0)
        assert kept.numel() == 0 or (kept - new).abs().max() < 1e-10 * max(1.0, top), name
        assert q.is_contiguous() and q.data_ptr() != p.data_ptr()
    return small


def check_bare(model: Any, units: fxmem.Coupling, none: fxmem.Masks) -> None:
    """Layers that cannot run empty keep one unit, which has no say; a sub-model for search too."""
    ids = torch.randint(3, 97, (3, 11))
    small = fxmem.materialize(model, none, units)
    left = {g.size for g in inner(fxmem.coupling(small))}
    assert 1 in left and left <= {0, 1}
    run = fxmem.instantiate(model, none, units, compile=False)
    with fxmem.masked(model, none, units), torch.no_grad():
        want = model(input_ids=ids).logits
        assert (small(input_ids=ids).logits - want).abs().max() < 1e-10
        assert (run({"input_ids": ids}).logits - want).abs().max() < 1e-10


@pytest.mark.parametrize(("name", "attention"), MATRIX)
def test_masked_equals_sliced(name: str, attention: str) -> None:
    model = build(name, attention)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    units = fxmem.coupling(model)
    kinds = ["kv_groups", *(["experts"] if name in MIXTURES else []), "mlp_channels"]
    wide = ["width"] if name not in ("gpt2", "opt") else []
    assert [g.kind for g in units.groups] == kinds * 2 + wide
    for keep in (0.6, 0.3):
        check(model, units, drawn(units, keep))
    least = {g.name: tuple(range(g.least)) for g in inner(units)}
    none = fxmem.Masks.from_kept(units, least)
    if name in ("gpt2", "opt"):  # their split and views fail on no elements
        check_bare(model, units, none)
    else:
        check(model, units, none)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.fixture(scope="module")
def llama() -> tuple[Any, fxmem.Coupling]:
    return build("llama"), coupled("llama")


def test_groups_of_a_llama(llama: tuple[Any, fxmem.Coupling]) -> None:
    units = llama[1]
    assert [(g.kind, g.size, g.cost) for g in inner(units)] == [
        ("kv_groups", 5, 960), ("mlp_channels", 72, 120),
    ] * 2  # fmt: skip


def test_sizes_are_searched_once(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    fxmem.materialize(model, drawn(units, 0.5), units)
    before = attributes.searches
    for _ in range(3):
        fxmem.materialize(model, drawn(units, 0.5), units)
    assert attributes.searches == before


def test_masks_compose(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    first = drawn(units, 0.7)
    small = fxmem.materialize(model, first, units)
    second = drawn(fxmem.coupling(small), 0.5)
    twice = fxmem.materialize(small, second)
    once = fxmem.materialize(model, second.after(first), units)
    assert all(
        torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True)
    )
    assert fxmem.coupling(twice) == fxmem.coupling(once)


def test_transform_returns_the_smaller_model(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    masks = drawn(units, 0.5)
    plan = fxmem.Plan(prune=masks)
    assert fxmem.Plan.from_toml(plan.to_toml()) == plan == fxmem.Plan.from_json(plan.to_json())
    small = fxmem.transform(model, plan)
    assert small is not model
    gone = masks.sparsity(units)["parameters"]
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert left == pytest.approx(1 - gone, abs=1e-12)


def test_one_graph_for_many_sub_models(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    torch._dynamo.reset()
    counter = CompileCounter()
    ids = torch.randint(3, 97, (2, 9))
    for _ in range(4):
        bools = {g.name: torch.rand(g.size) < 0.5 for g in inner(units)}
        for b in bools.values():
            b[:2] = True
        masks = fxmem.Masks.from_bools(units, bools)
        run = fxmem.instantiate(model, masks, units, compile=counter)
        with torch.no_grad(), fxmem.masked(model, masks, units):
            want = model(input_ids=ids, use_cache=False).logits
        with torch.no_grad():
            got = run({"input_ids": ids, "use_cache": False}).logits
        assert (got - want).abs().max() < 1e-10
    assert counter.frame_count == 1


def test_saved_model_loads_equal(llama: tuple[Any, fxmem.Coupling], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model, units = llama
    small: Any = fxmem.materialize(model, drawn(units, 0.5), units)
    fxmem.save_pretrained(small, tmp_path)
    again: Any = fxmem.from_pretrained(tmp_path)
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        assert torch.equal(small(input_ids=ids).logits, again(input_ids=ids).logits)
    assert list(small.state_dict()) == list(again.state_dict())
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(
            (ValueError, RuntimeError), match="fxmem-pruned|size mismatch|mismatched"
        ):
            cls.from_pretrained(tmp_path)
    (tmp_path / "pruning.json").write_text("{")
    with pytest.raises(fxmem.FxmemError):
        fxmem.from_pretrained(tmp_path)


def test_generate(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    masks = drawn(units, 0.5)
    small: Any = fxmem.materialize(model, masks, units)
    ids = torch.randint(3, 97, (2, 6))
    padding = torch.ones_like(ids)
    padding[0, :2] = 0
    options: Any = {"attention_mask": padding, "max_new_tokens": 5, "do_sample": False}
    with fxmem.masked(model, masks, units):
        want = model.generate(ids, **options)
    assert torch.equal(small.generate(ids, **options), want)
    assert torch.equal(small.generate(ids, cache_implementation="static", **options), want)


def test_bad_masks_are_named(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    group = units.groups[0].name
    heads = torch.ones(10, dtype=torch.bool)
    heads[3] = False
    with pytest.raises(fxmem.MaskError, match="KV group 1"):
        fxmem.Masks.from_bools(units, {group: heads})
    with pytest.raises(fxmem.MaskError, match="unknown unit kind"):
        fxmem.Masks.full(units).rounded(units, {"neurons": 8})
    with pytest.raises(fxmem.MaskError, match="another model"):
        fxmem.materialize(model, fxmem.Masks("0" * 16, ()), units)
    counts = drawn(units, 0.5).rounded(units, 8).counts
    assert all(kept % 8 == 0 for name, (kept, _) in counts.items() if "mlp" in name)


def test_state_of_the_module_is_kept(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    model.lm_head.weight.requires_grad_(False)
    model.train()
    calls: list[int] = []
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    try:
        small: Any = fxmem.materialize(model, drawn(units, 0.5), units)
        assert small.training and not small.lm_head.weight.requires_grad
        assert next(small.parameters()).dtype == torch.float64
        calls.clear()
        small(input_ids=torch.randint(3, 97, (1, 5)))
        assert calls == [1]
    finally:
        handle.remove()
        model.eval()
        model.lm_head.weight.requires_grad_(True)


def test_smaller_model_streams(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    masks = drawn(units, 0.5)
    ids = torch.randint(3, 97, (2, 16))
    plain: Any = fxmem.transform(model, fxmem.Plan(prune=masks))
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=4, loss_chunk=4), prune=masks)
    streamed: Any = fxmem.transform(model, plan)
    with everything_in_double():
        for m in (plain, streamed):
            m.train()
            m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() < 1e-10 * max(1.0, float(a.grad.abs().max()))


def test_fresh_process_loads_equal_logits(
    llama: tuple[Any, fxmem.Coupling], tmp_path: Path
) -> None:
    model, units = llama
    bools = {g.name: torch.rand(g.size) < 0.5 for g in inner(units)}
    bools[units.groups[0].name][:] = False  # a layer with no heads
    small: Any = fxmem.materialize(model, fxmem.Masks.from_bools(units, bools), units)
    fxmem.save_pretrained(small, tmp_path)
    ids = torch.randint(3, 97, (2, 9))
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch, fxmem; d = sys.argv[1]; torch.set_num_threads(int(sys.argv[2])); "
        "m = fxmem.from_pretrained(d); ids = torch.load(d + '/ids.pt'); "
        "torch.save(m(input_ids=ids).logits.detach(), d + '/out.pt')"
    )
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", code, str(tmp_path), threads], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt"), small(input_ids=ids).logits)
