"""One measured training run: losses, seconds, peaks, a memory curve and the first gradients.

The demo and the benchmark time every setup with this loop, each in a process of its own, so that
their figures mean the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxmem.measure.live import HighWater, return_freed_memory, track

Emit = Callable[[dict[str, Any]], None]
"""Takes one progress message: a dict that JSON can hold."""


@dataclass(frozen=True)
class Trial:
    """What to run and what to keep.

    Attributes:
        steps: training steps; the first one also pays for compilation and is timed apart.
        gradients: file for the gradients of the first step, or None.
        timeline: whether to run one more forward and backward, recorded, after the steps.
        points: samples kept of the recorded curve.
    """

    steps: int
    gradients: Path | None = None
    timeline: bool = True
    points: int = 1500


def run_trial(
    trial: Trial,
    loss_fn: Callable[[], torch.Tensor],
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    update: Callable[[], object],
    high_water: HighWater,
    emit: Emit = lambda message: None,
) -> dict[str, Any]:
    """Run the steps and return figures that JSON can hold.

    Args:
        trial: what to run.
        loss_fn: forward of one step; its result is back-propagated.
        parameters: names and parameters whose gradients are compared.
        update: changes the parameters after each backward, such as ``optimizer.step``.
        high_water: reset here before the step that is measured.
        emit: told after every step.

    Returns:
        ``losses`` and ``seconds`` per step, ``first_seconds``, ``median_seconds`` of the later
        steps, ``process_peak`` of one more step, ``lifetime_peak`` of the process, ``peak`` of live
        tensor bytes above the start of a step, and ``timeline``.
    """
    named = list(parameters)
    losses: list[float] = []
    seconds: list[float] = []
    _drop_gradients(named)
    emit({"event": "training"})
    for step in range(trial.steps):
        began = time.perf_counter()
        losses.append(_forward_backward(loss_fn))
        spent = time.perf_counter() - began
        if step == 0 and trial.gradients is not None:
            save_gradients(named, trial.gradients)
        began = time.perf_counter()
        update()
        _drop_gradients(named)
        seconds.append(spent + time.perf_counter() - began)
        emit({"event": "step", "step": step + 1, "loss": losses[-1], "seconds": seconds[-1]})
    # Steps are timed with the heap as everyone has it; the peak is read with one that keeps none.
    emit({"event": "peak"})
    return_freed_memory()
    high_water.reset()
    _forward_backward(loss_fn)
    update()
    result: dict[str, Any] = {
        "losses": losses,
        "seconds": seconds,
        "first_seconds": seconds[0],
        "median_seconds": statistics.median(seconds[1:] or seconds),
        "process_peak": high_water.peak,
        "lifetime_peak": high_water.lifetime,
        "resettable": high_water.resettable,
    }
    _drop_gradients(named)
    if trial.timeline:
        emit({"event": "recording"})
        curve = track(lambda: loss_fn().backward())
        _drop_gradients(named)
        result["peak"] = curve.peak
        result["timeline"] = curve.downsample(trial.points).to_dict()
    return result


def _forward_backward(loss_fn: Callable[[], torch.Tensor]) -> float:
    loss = loss_fn()
    loss.backward()
    return float(loss.detach())


def save_gradients(named: Iterable[tuple[str, torch.nn.Parameter]], path: Path) -> None:
    """Write every gradient to one file, without a copy in memory."""
    torch.save({name: p.grad for name, p in named if p.grad is not None}, path)


def largest_difference(reference: Path, other: Path) -> tuple[float, str]:
    """Largest relative difference between two files of :func:`save_gradients`, and where it is.

    Per parameter, max |difference| / max |reference|; the largest of these. A gradient that only
    one of the files has, or that is not finite, counts as infinitely wrong.
    """
    expected, got = (torch.load(path, mmap=True, weights_only=True) for path in (reference, other))
    worst, where = 0.0, ""
    for name in expected.keys() | got.keys():
        ratio = _relative(expected.get(name), got.get(name))
        if ratio > worst or not where:
            worst, where = ratio, name
    return worst, where


def _relative(expected: torch.Tensor | None, got: torch.Tensor | None) -> float:
    if expected is None or got is None or expected.shape != got.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if expected.dtype.itemsize < 4:
        expected, got = expected.float(), got.float()
    difference = float((expected - got).abs_().max())
    scale = float(expected.abs().max())
    if not (difference < float("inf")):
        return float("inf")
    return difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))


def _drop_gradients(named: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    for _, parameter in named:
        parameter.grad = None
