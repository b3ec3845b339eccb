"""The benchmark of block training: what is counted, honest tables, a short run end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import benchmarks_package  # noqa: F401
import pytest
import torch
from sources import ROOT

from benchmarks.blocks import Options, cases, kept, parse, request
from benchmarks.blocks_live import LiveGradients, bound
from benchmarks.blocks_report import markdown, summarise, write
from benchmarks.blocks_setups import SETUPS, Rates, missing, plan
from benchmarks.blocks_worker import measure, read, split
from fxmem import Blocks


def test_live_gradients_sees_gradients_state_and_temporaries_and_their_end() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 24, bias=False), torch.nn.Linear(24, 3))
    opt = torch.optim.AdamW(net.parameters())
    size = sum(p.nbytes for p in net.parameters())
    largest = max(p.nbytes for p in net.parameters())
    x, left = torch.randn(5, 8), []
    torch.vmap(lambda row: left.append(row) or row)(x)  # such a tensor has no storage
    for first in (True, False):
        state = [v for e in opt.state.values() for v in e.values() if v.dim()]
        live = LiveGradients(net.parameters(), state)
        loss = net(x).square().sum()
        with live:
            loss.backward()
            after = live.peak
            opt.step()
        assert after == size * (1 if first else 3)
        assert 3 * size <= live.peak <= 3 * size + 2 * largest
        for p in net.parameters():
            p.grad = None
    weights = dict(net.named_parameters())
    assert bound(weights, ["1.weight", "1.bias"], ["0.weight"]) == 3 * 75 * 4 + 192 * 4


def asked(part: str, setup: str, **other: Any) -> dict[str, Any]:
    case = next(c for c in cases(Options(parts=(part,), setups=(setup,))))
    return {**request(case, Options(length=48, threads=1), "tiny"), **other}


@pytest.mark.parametrize("setup", ["fxmem-badam", "bread-sgd", "bread-lora"])
def test_gradients_and_state_stay_within_the_active_block_and_one_gradient(setup: str) -> None:
    result = measure(asked("memory", setup), lambda message: None)
    # without gradients of inactive weights, a temporary of AdamW's step is the largest other one
    other = 0 if setup == "bread-sgd" else 1024 * 256 * 4
    assert result["live_gradients"] <= result["allowed"] + other
    assert result["live_gradients"] < result["parameters"]
    assert result["peak"] > result["state_bytes"] > 0


def test_a_pass_visits_every_block_once() -> None:
    result = measure(asked("time", "fxmem-badam"), lambda message: None)
    assert len(result["seconds"]) == 2
    assert result["mean_seconds"] == pytest.approx(sum(result["seconds"]) / 2)


def test_plans_differ_by_their_inactive_update_alone() -> None:
    base = Blocks(seed=3, steps=7)
    plans = {n: plan(n, base, Rates()).blocks for n in SETUPS if n.startswith(("fxmem", "bread"))}
    assert plans["fxmem-badam"] == base
    assert {p.reach for n, p in plans.items() if p and n != "bread-sgd-all"} == {"deeper"}
    assert all(p and p.seed == 3 and p.steps == 7 for p in plans.values())


def test_the_order_of_setups_turns_and_bad_options_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = Options(parts=("time",), setups=("adamw", "lora"), repeats=2)
    assert [c.setup for c in cases(options)] == ["adamw", "lora", "lora", "adamw"]
    for wrong in (["--repeats", "0"], ["--setups", "magic"], ["--parts", "magic"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "error" in capsys.readouterr().err
    assert parse(["--sgd-lr", "0.5"]).rates.sgd == 0.5


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in (missing(SETUPS["lora"]) or "")
    assert missing(SETUPS["adamw"]) is None


def test_texts(tmp_path: Path) -> None:
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"question": "a?", "answer": "b"}\n{"question": "c?", "answer": "d"}\n')
    assert read(lines) == "a?\nb\n\nc?\nd"
    held_out, learned = split(torch.arange(16).view(16, 1))
    assert held_out.flatten().tolist() == [7, 15]
    assert len(learned) == 14


def record(part: str, setup: str, repeat: int = 0, **figures: Any) -> dict[str, Any]:
    base = {"part": part, "setup": setup, "repeat": repeat, "seed": repeat, "status": "ok"}
    base["run"] = "now"
    return {**base, **figures}


RECORDS = [
    record("time", "adamw+checkpoint", 0, mean_seconds=2.0),
    record("time", "adamw+checkpoint", 1, mean_seconds=4.0),
    record("time", "fxmem-badam", 0, mean_seconds=1.0),
    record("time", "fxmem-badam", 1, mean_seconds=2.0),
    record("time", "bread-sgd", 0, mean_seconds=1.5),
    record("time", "bread-sgd", 1, mean_seconds=2.4),
    record("time", "lora", 0, status="not installed", reason="pip | install"),
    record("memory", "bread-sgd", peak=2**20, state_bytes=2**19, live_gradients=2**18, allowed=9),
    record("learning", "bread-sgd", 0, curve=[[0, 3.0], [4, 2.0]], final=2.0,
           rates=asdict(Rates())),
    record("learning", "bread-sgd", 1, curve=[[0, 3.0], [4, 1.0]], final=1.0,
           rates=asdict(Rates())),
]  # fmt: skip


def test_times_are_compared_within_a_repeat_and_losses_averaged(tmp_path: Path) -> None:
    rows = {row["setup"]: row for row in summarise(RECORDS)}
    assert rows["fxmem-badam"]["to_adamw"] == 0.5
    assert rows["bread-sgd"]["to_badam"] == pytest.approx(1.35)
    assert rows["bread-sgd"]["final"] == 1.5
    options = {**asdict(Options()), "out": None}
    data = {"options": {"time": options, "learning": options}, "records": RECORDS}
    assert "pip / install" in markdown(data)
    assert "(BREAD): block 0.0001, sgd 0.01\n" in markdown(data)
    files = write(data, tmp_path / "blocks-tiny.json")
    assert [f.suffix for f in files] == [".json", ".md", ".png"]
    assert files[2].stat().st_size > 10_000


def test_records_of_other_parts_and_setups_stay(tmp_path: Path) -> None:
    options = Options(out=tmp_path, parts=("time", "learning"), setups=("adamw",))
    assert kept(options) == []
    (tmp_path / "blocks-tiny.json").write_text(json.dumps({"records": RECORDS}))
    assert {r["part"] for r in kept(options)} == {"memory", "learning"}
    both = replace(options, append=True)
    assert {r["part"] for r in kept(both)} == {"time", "memory", "learning"}


def test_short_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.blocks", "--parts", "learning", "--out"]
    command += [str(tmp_path), "--setups", "bread-lora", "--learn-steps", "3", "--window", "32"]
    command += ["--visit", "1", "--every", "2", "--held-out", "2", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "blocks-tiny.json").read_text())["records"]
    assert [step for step, _ in found["curve"]] == [0, 2, 3]
    assert found["final"] < found["curve"][0][1]
    assert (tmp_path / "blocks-tiny.png").exists()
