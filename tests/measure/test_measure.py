"""Measuring: exact sums on known allocations, curves that keep their peak, trials, processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxmem.measure.live import (
    HighWater,
    Timeline,
    available_bytes,
    parameter_bytes,
    peak_bytes,
    process_peak_bytes,
    resident_bytes,
    track,
)
from fxmem.measure.subprocess_job import FAILED, OK, run_isolated
from fxmem.measure.training_run import Trial, largest_difference, run_trial, save_gradients

MIB = 2**20


def allocate(mib: int) -> torch.Tensor:
    return torch.zeros(mib * MIB // 4)


def test_track_sums_allocations_and_frees() -> None:
    def work() -> None:
        first = allocate(8)
        second = allocate(4)
        del first
        third = allocate(2)
        del second, third

    curve = track(work)
    assert curve.peak == 12 * MIB
    assert curve.live[-1] == 0
    assert list(curve.times) == sorted(curve.times)
    assert curve.times[0] == 0.0


def test_track_sees_temporaries_inside_operators() -> None:
    x = torch.randn(1024, 64)
    y = torch.randint(64, (1024,))
    # The log-probabilities live inside the operator alone.
    assert peak_bytes(lambda: torch.nn.functional.cross_entropy(x, y)) >= x.numel() * 4


def test_freeing_what_was_there_does_not_hide_a_peak() -> None:
    held = [allocate(4)]

    def work() -> torch.Tensor:
        held.clear()
        return allocate(1)

    assert track(work).peak == 1 * MIB


def test_nothing_allocated() -> None:
    assert track(lambda: None) == Timeline((), (), 0)


def test_events_in_any_order() -> None:
    curve = Timeline.from_events([(3_000, -5), (1_000, 5), (2_000, 7)])
    assert curve.live == (5, 12, 7)
    assert curve.times == (0.0, 1e-6, 2e-6)
    assert curve.peak == 12


def test_downsampling_keeps_peak_ends_and_order() -> None:
    events = [(1_000 * at, 64 if at % 2 == 0 else -60) for at in range(1_000)]
    events[501] = (501_000, 10_000)
    whole = Timeline.from_events(events)
    small = whole.downsample(50)
    assert len(small.times) <= 54
    assert small.peak == whole.peak == max(small.live)
    assert small.times[-1] == whole.times[-1]
    assert list(small.times) == sorted(small.times)
    assert small.downsample(100) is small


def test_timeline_survives_json() -> None:
    curve = track(lambda: allocate(1))
    back = Timeline.from_dict(curve.to_dict())
    assert back.live == curve.live
    assert back.peak == curve.peak


def test_high_water_follows_the_process() -> None:
    mark = HighWater()
    held = torch.ones(64 * MIB // 4)
    reached = mark.peak
    assert reached >= 64 * MIB
    del held
    mark.reset()
    # The kernel counts pages per thread and merges the counts late.
    assert mark.lifetime >= reached - MIB
    if mark.resettable:
        assert mark.peak < reached
    assert process_peak_bytes() >= resident_bytes() // 2


def test_available_memory_is_unknown_or_positive() -> None:
    free = available_bytes()
    assert free is None or free > 0


def test_tied_parameters_count_once() -> None:
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    assert parameter_bytes(torch.nn.Sequential(first, second)) == 8 * 8 * 4


def test_trial_reports_steps_and_leaves_no_gradients(tmp_path: Path) -> None:
    model = torch.nn.Linear(16, 16)
    x = torch.randn(4, 16)
    messages: list[dict[str, object]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    figures = run_trial(
        Trial(steps=3, gradients=tmp_path / "g.pt"),
        lambda: model(x).square().mean(),
        model.named_parameters(),
        optimizer.step,
        HighWater(),
        messages.append,
    )
    assert len(figures["losses"]) == len(figures["seconds"]) == 3
    assert figures["losses"][2] < figures["losses"][0]
    assert figures["peak"] == max(figures["timeline"]["live"]) > 0
    assert [m["step"] for m in messages if m["event"] == "step"] == [1, 2, 3]
    assert all(p.grad is None for p in model.parameters())
    assert set(torch.load(tmp_path / "g.pt")) == {"weight", "bias"}


def saved(path: Path, **grads: torch.Tensor | None) -> Path:
    named = []
    for name, grad in grads.items():
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = grad
        named.append((name, parameter))
    save_gradients(named, path)
    return path


def test_largest_difference(tmp_path: Path) -> None:
    one, half = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -1.5])
    reference = saved(tmp_path / "a", x=one, y=one)
    assert largest_difference(reference, reference)[0] == 0.0
    close = saved(tmp_path / "b", x=one, y=half)
    assert largest_difference(reference, close) == (0.25, "y")
    absent = saved(tmp_path / "c", x=one, y=None)
    assert largest_difference(reference, absent) == (float("inf"), "y")
    broken = saved(tmp_path / "d", x=one * float("nan"), y=one)
    assert largest_difference(reference, broken) == (float("inf"), "x")
    zero = saved(tmp_path / "e", x=torch.zeros(2))
    assert largest_difference(zero, zero)[0] == 0.0


JOB = """
from fxmem.measure.subprocess_job import serve
def job(request, emit):
    print("noise of a library")
    print([1, 2])
    emit({"event": "hello", "value": request["value"]})
    if request["value"] < 0:
        raise ValueError("too small")
    if request["value"] > 9:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    if request["value"] == 9:
        import os; os._exit(3)
    return {"double": 2 * request["value"]}
if __name__ == "__main__":
    serve(job)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_job.py").write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)
    return "some_job"


def test_isolated_job_answers_and_reports_progress(job: str) -> None:
    heard: list[dict[str, object]] = []
    assert run_isolated(job, {"value": 4}, heard.append) == {"status": OK, "double": 8}
    assert heard == [{"event": "hello", "value": 4}]


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        (-1, FAILED, "ValueError: too small"),
        (10, "out of memory", "can't allocate memory"),
        (9, FAILED, "exit code 3"),
    ],
)
def test_isolated_job_that_fails_is_a_result(job: str, value: int, status: str, words: str) -> None:
    result = run_isolated(job, {"value": value})
    assert result["status"] == status
    assert words in result["reason"]
    assert "detail" in result
