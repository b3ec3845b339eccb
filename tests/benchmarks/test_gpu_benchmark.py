"""The GPU benchmark and the roofline table, on a CPU with tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks_package  # noqa: F401
import pytest
import torch

from benchmarks import gpu, roofline
from benchmarks.gpu_case import Case, Setting
from benchmarks.gpu_cases import CASES
from fxmem.kernels.kernel import Cost
from fxmem.kernels.registry import kernels

CPU = Setting(torch.device("cpu"), torch.float32, small=True)


def test_one_command_writes_table_and_picture(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--small", "--dtype", "float32", "--repeats", "1"]
    gpu.main([*arguments, "--layers", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    ran = [row for row in rows if "reason" not in row]
    assert {row["case"] for row in ran} == {CASES[n](CPU).name for n in CASES} | {"step"}
    # All that ran computed the same; the kernels' references on this device.
    assert not [row for row in ran if not row["difference"] <= 1e-5]
    ours = [row for row in ran if row["implementation"].startswith("fxmem")]
    assert len(ours) == len(CASES) + 1  # and the step
    assert all(row["peak"] >= 0 and row["seconds"] > 0 for row in ran)
    text = (tmp_path / "gpu.md").read_text()
    assert all(row["implementation"] in text for row in rows) and "times mean nothing" in text
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_failures_become_rows_with_a_reason() -> None:
    def broken() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no room\nsecond line")

    case = Case("x", "n 1", {"a | b": broken, "c": "not installed"}, Cost(1, 1))
    rows = gpu.measure_case(case, CPU, 1)
    assert [row["reason"] for row in rows] == ["RuntimeError: no room", "not installed"]
    assert "not run: not installed" in gpu.markdown(rows, "about")


def test_a_wrong_result_shows() -> None:
    case = Case(
        "x", "n 1", {"fxmem": lambda: (torch.ones(3),), "torch": lambda: (torch.zeros(3) + 2,)},
        Cost(1, 1),
    )  # fmt: skip
    rows = gpu.measure_case(case, CPU, 1)
    assert rows[0]["difference"] == 0.5 and rows[1]["difference"] == 0.0


def test_needs_a_gpu_or_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        assert gpu.parse([]).device == "cuda"
        return
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "--device cpu --small" in capsys.readouterr().err


def test_the_roofline_table_in_the_docs_is_the_present_one() -> None:
    text = roofline.DOCUMENT.read_text()
    assert roofline.with_table(text) == text
    assert all(f"| {kernel.name} |" in text for kernel in kernels())


def test_bound_is_the_slower_of_compute_and_memory() -> None:
    assert roofline.bound(Cost(312e12, 1), "A100") == (pytest.approx(1.0), "compute")
    assert roofline.bound(Cost(1, 3.35e12, False), "H100") == (pytest.approx(1.0), "memory")
