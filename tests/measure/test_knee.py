"""Rows per chunk and rates are measured once per machine, out of the way of the caller's modes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fxmem._compat.graph import FakeTensorMode
from fxmem._compat.memory import StorageWatch
from fxmem.measure import knee, undisturbed
from fxmem.measure.remembered import remembered
from fxmem.memory import device

CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knee, "ROWS", (8, 16, 32))
    monkeypatch.setattr(knee, "STEADY", float("inf"))
    monkeypatch.setattr(knee, "ALONE", 0.0)


@given(st.dictionaries(st.integers(1, 4096), st.floats(1e-9, 1.0), min_size=1))
def test_the_knee_is_the_least_that_is_nearly_the_best(curve: dict[int, float]) -> None:
    rows, best = knee.of_curve(curve), min(curve.values())
    assert curve[rows] <= knee.WITHIN * best
    assert all(curve[r] > knee.WITHIN * best for r in curve if r < rows)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_measured_aside(dtype: torch.dtype) -> None:
    with FakeTensorMode(), StorageWatch() as watch, torch.inference_mode():
        assert knee.measure(CPU, dtype) in ([8], [16], [32])
    assert watch.peak == 0


@pytest.mark.usefixtures("short")
def test_what_cannot_be_measured_has_a_nominal_answer() -> None:
    assert knee.measure(CPU, torch.float8_e4m3fn) == []
    assert knee.knee(CPU, torch.float8_e4m3fn) == knee.NOMINAL["cpu"]
    assert knee.knee(torch.device("meta"), torch.float32) == knee.NOMINAL_DEVICE


@given(
    st.dictionaries(st.integers(1, 4096), st.lists(st.floats(1e-6, 1.0), min_size=1), min_size=1)
)
def test_a_busy_machine_has_times_apart(times: dict[int, list[float]]) -> None:
    apart = [sorted(t)[1] / min(t) for t in times.values() if len(t) > 1]
    if knee.is_steady(times):
        assert sum(x <= knee.STEADY for x in apart) * 2 >= len(apart) > 0
    else:
        assert sum(x > knee.STEADY for x in apart) * 2 >= len(apart)
    assert knee.is_steady({rows: [t[0], t[0], 1.0] for rows, t in times.items()})


def test_a_busy_machine_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(knee, "_times", lambda *_: {64: [1.0, 2.0], 128: [1.0, 3.0]})
    knee._knee.cache_clear()
    assert knee.knee(CPU, torch.float32) == knee.NOMINAL["cpu"]
    knee._knee.cache_clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_times_of_a_processor_in_use_are_not_taken(
    share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Steady or not: the process has had a part of the processor."""
    monkeypatch.setenv("FXMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(knee, "ROWS", (8, 16, 32))
    monkeypatch.setattr(knee, "STEADY", float("inf"))
    used = itertools.count(step=share * torch.get_num_threads() / 64)
    wall = itertools.count(step=1 / 64)
    clock = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(used))
    monkeypatch.setattr(undisturbed, "time", clock)
    for known in (knee._knee, device.rates):
        known.cache_clear()
    rows, rates = knee.knee(CPU, torch.float32), device.rates(CPU)
    alone = share == 1.0
    assert (rows == knee.NOMINAL["cpu"]) is not alone
    assert (rates.compute == device.CPU) is not alone
    assert bool(list(tmp_path.iterdir())) is alone
    for known in (knee._knee, device.rates):
        known.cache_clear()


def test_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def measured() -> list[float]:
        asked.append(1)
        return [1.0, 2.0]

    def ask(detail: str = "float32") -> list[float]:
        return remembered("speed", CPU, detail, measured)

    monkeypatch.setenv("FXMEM_CACHE", str(tmp_path / "new"))
    assert ask() == ask() == [1.0, 2.0]
    assert len(asked) == 1
    ask("bfloat16")
    file = tmp_path / "new" / "measured.json"
    known = json.loads(file.read_text())
    assert len(known) == len(asked) == 2
    for broken in ("{", "[]", json.dumps(dict.fromkeys(known, [1.0, -1.0, "x"]))):
        file.write_text(broken)
        assert ask() == [1.0, 2.0]
    assert len(asked) == 5
    (tmp_path / "file").touch()
    monkeypatch.setenv("FXMEM_CACHE", str(tmp_path / "file"))
    assert ask() == [1.0, 2.0]
