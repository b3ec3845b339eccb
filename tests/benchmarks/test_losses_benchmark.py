"""Losses outside the model beside labels passed, end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import benchmarks_package  # noqa: F401
import pytest
from sources import ROOT

from benchmarks.objectives import OUTSIDE


@pytest.mark.slow
def test_short_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.losses", "--length", "128", "--steps", "1"]
    command += ["--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "losses-tiny.md").read_text().split("|--:|\n", 1)[1].splitlines()
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["labels passed", *OUTSIDE]
