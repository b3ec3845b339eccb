"""The coverage table: what is run, what is kept, what the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmarks_package  # noqa: F401
import pytest

from benchmarks import coverage
from benchmarks.coverage_case import KINDS, cases, types

EXACT: dict[str, Any] = {
    "kind": "causal", "type": "llama", "status": "exact", "barriers": [], "pieces": 0,
    "streamed": 50, "checkpointed": 100,
}  # fmt: skip
WHOLE = {**EXACT, "type": "odd", "barriers": ["aten.sort.default"], "pieces": 2}
LOOP = {**WHOLE, "type": "loop", "barriers": [], "reasons": ["`for a in b | c:`"]}
STOPPED = {"kind": "image", "type": "vit", "status": "stopped", "reason": "CaptureError: a | b"}
BROKEN = {**STOPPED, "status": "does not train in plain PyTorch"}


def test_the_page() -> None:
    page = coverage.table([BROKEN, STOPPED, WHOLE, LOOP, EXACT])
    assert page.index("## Causal") < page.index("## Image")
    assert f"3 of {len(types('causal'))} types: 3 exact. Exact with nothing whole: 1 of 3." in page
    assert "| llama | exact |  | 0.50 |" in page
    assert "| odd | exact | `aten.sort.default`, 2 modules | 0.50 |" in page
    assert "| loop | exact | 2 modules (`for a in b \\| c:`) | 0.50 |" in page
    assert "| vit | stopped: CaptureError: a \\| b |  |  |" in page


def test_the_latest_result_counts_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(r) + "\n" for r in (WHOLE, {**EXACT, "status": "wrong"})))
    ran: list[str] = []

    def run(kind: str, name: str, seconds: float) -> dict[str, Any]:
        ran.append(name)
        return {k: v for k, v in EXACT.items() if k not in ("kind", "type")}

    monkeypatch.setattr(coverage, "run", run)
    where = [
        "--kinds", "causal", "--types", "llama,gpt2", "--results", str(results), "--table",
        str(page),
    ]  # fmt: skip
    coverage.main(where)
    assert ran == ["gpt2"]
    coverage.main([*where, "--again"])
    assert ran == ["gpt2", "gpt2", "llama"]
    assert coverage.read(results)["causal", "llama"]["status"] == "exact"
    assert "types: 3 exact" in page.read_text()


def test_a_type_that_takes_too_long() -> None:
    assert coverage.run("causal", "llama", 0.01)["status"] == "out of time"


@pytest.mark.filterwarnings("ignore")  # a process of its own shows none
def test_one_type() -> None:
    exact, found = cases("causal", "llama")
    assert exact.items() <= found.items() and "streamed" not in exact
    assert found["status"] == "exact" and found["bodies"] > 0 and not found["barriers"]
    assert found["streamed"] > 0 and found["checkpointed"] > 0


def test_every_kind_has_types() -> None:
    assert {kind: bool(types(kind)) for kind in KINDS} == dict.fromkeys(KINDS, True)
