"""Models of smaller width used as models: files, generation, compilation, streaming, search."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_cases import build, coupled
from prune_options import scored
from test_width import double, drawn, llama, width
from torch._dynamo.testing import CompileCounter

import fxmem

__all__ = ["double", "llama"]  # fixtures

CODE = (
    "import sys, torch, fxmem; d = sys.argv[1]; torch.set_num_threads(int(sys.argv[2])); "
    "m = fxmem.from_pretrained(d); ids = torch.load(d + '/ids.pt'); "
    "torch.save(m(input_ids=ids).logits.detach(), d + '/out.pt')"
)


@pytest.mark.parametrize("name", ["gemma", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_fresh_process_loads_equal_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    units = coupled(name)
    small: Any = fxmem.materialize(model, drawn(units, 0.5, everything=True), units)
    fxmem.save_pretrained(small, tmp_path)
    ids = torch.randint(3, 97, (2, 9))
    torch.save(ids, tmp_path / "ids.pt")
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path), threads], check=True)
    with torch.no_grad():
        want = small(input_ids=ids).logits
        assert torch.equal(torch.load(tmp_path / "out.pt"), want)
    again: Any = fxmem.from_pretrained(tmp_path)
    assert fxmem.coupling(again) == fxmem.coupling(small)
    fxmem.save_pretrained(again, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(fxmem.from_pretrained(tmp_path / "again")(input_ids=ids).logits, want)


def test_file_of_before_the_width_loads(llama: tuple[Any, fxmem.Coupling], tmp_path: Path) -> None:
    model, units = llama
    heads = fxmem.Masks.from_kept(units, {units.groups[0].name: (1, 3)})
    small: Any = fxmem.materialize(model, heads, units)
    fxmem.save_pretrained(small, tmp_path)
    data = json.loads((tmp_path / "pruning.json").read_text())
    data["coupling"]["groups"] = [g for g in data["coupling"]["groups"] if g["kind"] != "width"]
    for group in data["coupling"]["groups"]:
        del group["norms"]
    data["masks"]["entries"] = [e for e in data["masks"]["entries"] if e[0] != "width"]
    (tmp_path / "pruning.json").write_text(json.dumps(data))
    again: Any = fxmem.from_pretrained(tmp_path)
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, small(input_ids=ids).logits)


def test_generate_and_compile(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    masks = drawn(units, 0.5, everything=True)
    small: Any = fxmem.materialize(model, masks, units)
    ids = torch.randint(3, 97, (2, 6))
    options: Any = {"max_new_tokens": 5, "do_sample": False}
    with fxmem.masked(model, masks, units):
        want = model.generate(ids, **options)
    assert torch.equal(small.generate(ids, **options), want)
    run = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits = small(input_ids=ids, use_cache=False).logits
        assert (run(input_ids=ids, use_cache=False).logits - logits).abs().max() < 1e-10


def test_one_graph_for_many_widths(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    torch._dynamo.reset()
    counter = CompileCounter()
    ids = torch.randint(3, 97, (2, 9))
    for _ in range(4):
        masks = drawn(units, 0.5)
        run = fxmem.instantiate(model, masks, units, compile=counter)
        with torch.no_grad(), fxmem.masked(model, masks, units):
            want = model(input_ids=ids, use_cache=False).logits
        with torch.no_grad():
            got = run({"input_ids": ids, "use_cache": False}).logits
        assert (got - want).abs().max() < 1e-10
    assert counter.frame_count == 1


def test_streams(llama: tuple[Any, fxmem.Coupling]) -> None:
    model, units = llama
    masks = drawn(units, 0.5, everything=True)
    ids = torch.randint(3, 97, (2, 16))
    plain: Any = fxmem.transform(model, fxmem.Plan(prune=masks))
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=4, loss_chunk=4), prune=masks)
    streamed: Any = fxmem.transform(model, plan)
    for m in (plain, streamed):
        m.train()
        m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() < 1e-10 * max(1.0, float(a.grad.abs().max()))


@pytest.mark.parametrize("name", ["llama_mha_tied"])
def test_scores_and_search(name: str) -> None:
    """A channel that is never written is worth nothing, and a search does not keep it."""
    model: Any = build(name)
    units = fxmem.coupling(model)
    group = width(units)
    with torch.no_grad():
        for p, axis in ((model.get_parameter(n), i) for n, i, _ in group.members):
            p.index_fill_(axis, torch.arange(0, 40, 2), 0)
    ids = torch.randint(3, 97, (2, 12))
    batches = [{"input_ids": ids, "labels": ids}]
    options = scored(
        keep=0.5, kinds=("width",), block=1, steps=4, samples=2, init="magnitude", lr=0.01
    )
    live = tuple(range(1, 40, 2))
    for method in ("magnitude", "wanda", "taylor", "random"):
        values, masks = fxmem.score(model, batches, method, options, coupled=units)
        assert list(values) == [group.name] and values[group.name].shape == (40,)
        assert (masks.kept(group.name) == live) == (method != "random")
    seen: list[int] = []
    masks = fxmem.search(
        model, batches, options, coupled=units, callback=lambda s: seen.append(s.counts.forwards)
    )
    assert seen[-1] >= 8
    assert masks.kept(group.name) == live
    small: Any = fxmem.materialize(model, masks, units)
    with torch.no_grad():
        assert (small(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-10


def test_width_is_searched_alone(llama: tuple[Any, fxmem.Coupling]) -> None:
    with pytest.raises(fxmem.PlanError, match="after"):
        fxmem.Prune(kinds=("width", "mlp_channels"))
    values, _ = fxmem.score(llama[0], [], "magnitude", coupled=llama[1])
    assert "width" not in values
