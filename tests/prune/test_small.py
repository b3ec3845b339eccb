"""Smaller models used as models: sizes, files, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prune_cases import build, coupled
from test_coupling_and_materialize import drawn, inner
from torch import Tensor

import fxmem


@pytest.fixture(scope="module")
def llama() -> tuple[Any, fxmem.Coupling]:
    return build("llama"), coupled("llama")


def test_sparsity_counts_what_a_smaller_model_has(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    masks = drawn(units, 0.5)
    small: Any = fxmem.materialize(model, masks, units)

    def size(m: Any, weight: Any) -> float:
        return sum(weight(n, p) for n, p in m.named_parameters())

    def macs(name: str, p: Tensor) -> int:
        return p.numel() if p.dim() == 2 and "embed" not in name else 0

    def held(name: str, p: Tensor) -> int:
        return p.numel() if ".layers." in name and p.dim() == 2 else 0

    found = masks.sparsity(units)
    for key, weight in {
        "parameters": lambda n, p: p.numel(),
        "bytes": lambda n, p: p.numel() * p.element_size(),
        "macs": macs,
        "prunable": held,
    }.items():
        assert found[key] == pytest.approx(1 - size(small, weight) / size(model, weight), abs=1e-12)
    assert 0 < found["parameters"] < found["macs"] < found["prunable"] < 1


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "gpt2", "opt", "mixtral")]
)
def test_others_save_load_and_compile(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(name)
    units = coupled(name)
    bools = {g.name: torch.rand(g.size) < 0.5 for g in inner(units)}
    for i, b in enumerate(bools.values()):
        b[:2] = i > 0  # the first group gets no unit
        b[2:] &= i > 0
    small: Any = fxmem.materialize(model, fxmem.Masks.from_bools(units, bools), units)
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        want = small(input_ids=ids).logits
        fxmem.save_pretrained(small, tmp_path)
        again: Any = fxmem.from_pretrained(tmp_path)
        assert torch.equal(again(input_ids=ids).logits, want)
        tokens = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(small.generate(ids, **tokens), again.generate(ids, **tokens))
        with pytest.raises((ValueError, OSError)):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        # The routing of experts depends on data, in the dense model too.
        run = torch.compile(again, backend="aot_eager", fullgraph=name != "mixtral")
        assert (run(input_ids=ids, use_cache=False).logits - want).abs().max() < 1e-10


def test_smaller_model_compiles(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    small: Any = fxmem.materialize(model, drawn(units, 0.5), units)
    run = torch.compile(small, backend="aot_eager", fullgraph=True)
    for length in (9, 5):
        ids = torch.randint(3, 97, (2, length))
        with torch.no_grad():
            want = small(input_ids=ids, use_cache=False).logits
            assert (run(input_ids=ids, use_cache=False).logits - want).abs().max() < 1e-10
