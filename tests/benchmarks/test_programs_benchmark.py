"""Random programs, counted: what a failure counts as, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks_package  # noqa: F401
import pytest

import fxmem
from benchmarks import programs
from benchmarks.programs import test_programs as generator


def test_a_run_counts_programs_and_operators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "programs.jsonl"
    results.write_text(json.dumps({"seed": 1, "programs": 9, "exact": 9, "seconds": 3600}) + "\n")
    programs.main(["--programs", "1", "--results", str(results)])
    found = json.loads(results.read_text().splitlines()[-1])
    assert found["programs"] == found["exact"] == 1 and found["operators"] > found["whole"]
    assert "10 programs: 10 exact, 0 wrong, 0 refused, 0 raw." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (AssertionError("x differs"), "wrong"),
        (fxmem.FxmemError("not this"), "refused"),
        (KeyError("a"), "raw"),
    ],
)
def test_a_failure_is_counted_and_told(
    error: Exception,
    ended: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(case: object) -> None:
        raise error

    monkeypatch.setattr(generator, "check", fails)
    case = generator.Case(["linear"], "squares", 1, (4,), 2, 2)
    assert programs.one(case) == {"programs": 1, ended: 1}
    assert capsys.readouterr().out.startswith(f"{ended}: Case(steps=['linear']")
