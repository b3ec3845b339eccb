"""The report: fields, text, and what it says before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem.errors import FileError
from fxmem.optional import UsageError
from fxmem.report.parts import BarrierReport, RegionReport
from fxmem.report.text import Report


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=32)))
    ids = torch.randint(512, (1, 100))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return model


def test_report_of_a_model_that_ran(model: LlamaForCausalLM) -> None:
    report = fxmem.explain(model)
    assert (report.captures, report.distinct_programs) == (1, 3)
    assert report.sizes["T"] == 100
    kinds = {r.kind: r for r in report.regions}
    assert kinds["mixing"].uses == 3
    assert kinds["loss"].uses == 1
    assert all("layers" in m for m in kinds["mixing"].modules)
    assert kinds["mixing"].chunk == 32
    assert {b.kind for b in report.buffers} == {"buffer", "accumulator"}
    assert all(b.bytes > 0 for b in report.buffers)
    assert report.loops
    assert report.barriers == []
    assert report.predicted_peak_bytes and report.predicted_peak_bytes > 0
    assert report.dropped == ["[1, T, 512]"]
    assert report.executed_bodies > 0


def test_text_names_what_matters_and_is_aligned(model: LlamaForCausalLM) -> None:
    text = str(fxmem.explain(model))
    for part in ("predicted peak", "MiB", "region", "backward", "barriers: none", "T = 100"):
        assert part in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_report_is_plain_data(model: LlamaForCausalLM) -> None:
    data = json.loads(json.dumps(fxmem.explain(model).to_dict()))
    assert data["regions"][0]["loops"][0]["direction"] in ("ascending", "descending")
    assert data["captures"] == 1


def test_the_picture_of_a_step(model: LlamaForCausalLM, tmp_path: Path) -> None:
    report = fxmem.explain(model)
    positions = [at for r in report.regions for k in r.keeps for at in k.positions]
    assert sorted(positions) == list(range(len(positions)))  # the loss is the last one
    report.draw(tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
    with pytest.raises(UsageError, match="no streamed step"):
        Report("Empty").draw(tmp_path / "empty.png")
    with pytest.raises(FileError, match="nowhere"):
        report.draw(tmp_path / "nowhere" / "step.png")
    assert [f.name for f in tmp_path.iterdir()] == ["step.png"]


def test_not_transformed() -> None:
    with pytest.raises(fxmem.FxmemError, match="Linear was not transformed"):
        fxmem.explain(nn.Linear(2, 2))


def test_not_run_yet() -> None:
    model = nn.Linear(2, 2)
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream()))
    report = fxmem.explain(model)
    assert report.captures == 0
    assert report.predicted_peak_bytes is None
    assert "not run yet" in str(report)


def test_a_backend_can_be_explained() -> None:
    backend = fxmem.backend()
    assert "backend" in str(fxmem.explain(backend))


def test_a_barrier_is_named() -> None:
    barrier = BarrierReport("aten.sort.default", "no row in the table", "inner", "model.py:3")
    report = Report("Model", captures=1)
    report.regions = [RegionReport("region0", "tokens", 1, ["inner"], 8, [], [barrier], [])]
    assert report.barriers == [barrier]
    for part in ("aten.sort.default", "no row in the table", "inner", "model.py:3"):
        assert part in str(report)
