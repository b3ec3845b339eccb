"""Predicted beside measured memory: one length, one budget, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sources import ROOT


def test_short_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--lengths", "512", "--budgets", "1"]
    command += ["--steps", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "memory-tiny.json").read_text())["records"]
    assert [r["setup"].split(":")[0] for r in records] == [
        "plain", "checkpoint", "fxmem", "fxmem", "fxmem"
    ]  # fmt: skip
    assert all(r["status"] == "ok" for r in records), records
    for r in records[:4]:
        assert r["peak"] <= 1.02 * r["predicted"] + 2**20, r
    assert records[4]["peak"] <= records[4]["budget"]
    assert (tmp_path / "memory-tiny.png").stat().st_size > 10_000
    assert "| 512 | plain autograd |" in done.stdout
