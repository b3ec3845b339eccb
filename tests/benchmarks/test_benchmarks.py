"""The benchmark: rivals that compute the same, honest tables, a short run end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import benchmarks_package  # noqa: F401
import pytest
import torch
from sources import ROOT

from benchmarks.objectives import OBJECTIVES, advantages, token_log_probs
from benchmarks.report import markdown, summarise, write
from benchmarks.setups import DEFAULT, SETUPS, build, why_not
from benchmarks.stream import Options, cases, parse
from benchmarks.tiled import find_mlps, tile_mlps
from benchmarks.turns import Turns
from benchmarks.worker import as_view, make_ids


def small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        use_cache=False,
    )
    return LlamaForCausalLM(config).double().train()


def gradients(setup: str, objective: str) -> tuple[float, dict[str, torch.Tensor]]:
    model = small_model()
    rows = OBJECTIVES[objective][1]
    ids = torch.arange(44).reshape(rows, -1) * 7 % 128
    loss = build(SETUPS[setup], model, objective, ids, "auto")()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


RIVALS = ("checkpoint", "lce", "checkpoint+lce", "checkpoint+lce+tiles")


APPLICABLE = [(s, o) for o in OBJECTIVES for s in RIVALS if not why_not(SETUPS[s], o)]


@pytest.mark.parametrize(("setup", "objective"), APPLICABLE)
def test_rivals_compute_what_plain_autograd_computes(setup: str, objective: str) -> None:
    loss, expected = gradients("plain", objective)
    other, got = gradients(setup, objective)
    # transformers takes its loss in float32, also of a model in float64.
    tolerance = 1e-5 if objective == "sft" else 1e-10
    assert other == pytest.approx(loss, rel=tolerance)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        worst = tolerance * float(grad.abs().max())
        torch.testing.assert_close(got[name], grad, rtol=0.0, atol=worst)


def test_mlps_are_found_by_structure() -> None:
    model = small_model()
    assert list(find_mlps(model)) == [layer.mlp for layer in model.model.layers]
    assert tile_mlps(model, 4) == 2


def test_objectives_agree_with_their_definitions() -> None:
    model = small_model()
    ids = torch.arange(22).reshape(2, 11)
    sft = OBJECTIVES["sft"][0](model, ids)
    torch.testing.assert_close(sft, -token_log_probs(model, ids).mean(), check_dtype=False)
    noise = advantages(torch.Size((4, 1000)))
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1.0) < 0.05


def test_ids_have_the_rows_of_the_objective() -> None:
    config = small_model().config
    assert make_ids("tiny", config, "dpo", 32).shape == (2, 16)
    assert make_ids("tiny", config, "sft", 32).shape == (1, 32)


def test_default_rows() -> None:
    assert DEFAULT[:2] == ("plain", "checkpoint")
    assert DEFAULT[-1] == "fxmem"
    assert all(why_not(SETUPS[setup], "sft") is None for setup in SETUPS)
    assert "not applicable" in (why_not(SETUPS["checkpoint+lce"], "dpo") or "")


def test_every_repeat_runs_every_setup_and_the_first_starts_with_the_reference() -> None:
    options = Options(repeats=2, objectives=("sft",))
    order = [case.setup for case in cases(options)]
    assert order[: len(DEFAULT)] == list(DEFAULT)
    assert sorted(order[len(DEFAULT) :]) == sorted(DEFAULT)
    assert order[len(DEFAULT)] != DEFAULT[0]


def test_ids_are_a_view_in_half_of_the_runs() -> None:
    runs = list(cases(Options(repeats=4, setups=("plain", "fxmem"))))
    assert sum(case.ids == "view" for case in runs) * 2 == len(runs)
    groups: dict[tuple[Any, ...], set[str]] = {}
    for case in runs:
        groups.setdefault((case.repeat, case.objective), set()).add(case.ids)
    assert {len(kinds) for kinds in groups.values()} == {1}
    both = list(cases(Options(repeats=1, objectives=("sft",), setups=("fxmem",), ids="both")))
    assert [case.name for case in both] == ["fxmem-fresh-sft", "fxmem-view-sft"]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_view_has_the_same_ids_elsewhere(rows: int) -> None:
    ids = torch.arange(rows * 7).view(rows, 7)
    view = as_view(ids)
    assert torch.equal(view, ids)
    assert view.storage_offset() and view.stride() != ids.stride()


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--repeats", "0"], ["--lengths", "2"], ["--setups", "magic"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "error" in capsys.readouterr().err


def record(repeat: int, setup: str, seconds: float, **other: Any) -> dict[str, Any]:
    base = {"repeat": repeat, "length": 8, "objective": "sft", "setup": setup, "status": "ok"}
    figures = {
        "seconds": [9.0, seconds],
        "peak": 2**20,
        "process_peak": 2**21,
        "first_seconds": 9.0,
        "losses": [1.5],
    }
    return {**base, **figures, "median_seconds": seconds, **other}


RECORDS = [
    record(0, "plain", 1.0),
    record(0, "checkpoint", 2.0, difference=0.0),
    record(0, "fxmem", 3.0, difference=1e-7),
    record(0, "chunker", 0.0, status="failed", reason="no | compiler"),
    record(1, "plain", 10.0),
    record(1, "checkpoint", 20.0),
    record(1, "fxmem", 10.0),
]


def test_times_are_compared_within_a_repeat() -> None:
    rows = {row["setup"]: row for row in summarise(RECORDS)}
    assert rows["plain"]["ratio"] == 0.5
    assert rows["fxmem"]["ratio"] == 1.0
    assert rows["fxmem"]["median_seconds"] == 6.5
    assert rows["fxmem"]["difference"] == 1e-7
    assert rows["chunker"]["status"] == "failed"


def test_views_are_compared_with_fresh_ids_of_their_repeat() -> None:
    rows = summarise([record(0, "fxmem", 2.0), record(0, "fxmem", 3.0, ids="view"), RECORDS[-1]])
    assert rows[0]["view"] == 1.5
    assert summarise(RECORDS)[0]["view"] is None
    assert "| 1.00 | 1.50 |" in markdown(rows, "title", "fxmem")


def test_without_checkpointing_times_are_relative_to_the_first_setup() -> None:
    rows = {r["setup"]: r for r in summarise([r for r in RECORDS if r["setup"] != "checkpoint"])}
    assert rows["fxmem"]["ratio"] == 2.0
    assert rows["plain"]["ratio"] == 1.0


def test_steps_are_compared_one_by_one() -> None:
    slow_then_fast = {**record(0, "plain", 0.0), "seconds": [9.0, 4.0, 1.0, 1.0]}
    same_weather = {**record(0, "fxmem", 0.0), "seconds": [9.0, 8.0, 2.0, 2.0]}
    rows = summarise([slow_then_fast, same_weather])
    assert [row["ratio"] for row in rows] == [1.0, 2.0]


def test_turns_go_round_and_leave_nobody_waiting() -> None:
    turns, order = Turns(["a", "b", "c"]), []

    def work(name: str, steps: int) -> None:
        turns.take(name)
        for step in range(steps):
            order.append(f"{name}{step}")
            turns.pass_on(name)
        turns.leave(name)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, ("c", "b", "a"), (1, 3, 2)))
    assert order == ["a0", "b0", "c0", "a1", "b1", "b2"]


def test_table_and_pictures(tmp_path: Path) -> None:
    text = markdown(summarise(RECORDS), "title")
    assert "| **fxmem** | 1 | 2 | 6500 | 3000 | 1.00 |  | 9.0 | 1.5 | 1.0e-07 |" in text
    assert "failed: no / compiler" in text
    longer = [{**row, "length": 16} for row in RECORDS]
    files = write(RECORDS + longer, tmp_path, "stream", "title")
    assert [file.name for file in files] == ["stream.md", "stream.png", "stream-lengths.png"]
    assert all(file.stat().st_size > 0 for file in files)


@pytest.mark.slow
def test_short_run_by_turns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.stream", "--lengths", "64", "--repeats", "1"]
    command += ["--steps", "2", "--objectives", "sft", "--out", str(tmp_path)]
    command += ["--setups", "plain", "fxmem", "--by-turns"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "stream-tiny.json").read_text())["records"]
    assert [row["setup"] for row in records] == ["plain", "fxmem"]
    assert all(row["status"] == "ok" and len(row["seconds"]) == 3 for row in records)
    assert records[1]["difference"] < 1e-4


def test_short_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.stream", "--lengths", "64", "--repeats", "1"]
    command += ["--steps", "1", "--objectives", "dpo", "--out", str(tmp_path)]
    command += ["--setups", "plain", "checkpoint+lce"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "stream-tiny.json").read_text())
    assert [row["status"] for row in data["records"]] == ["ok", "not applicable"]
    assert (tmp_path / "stream-tiny.md").exists()
