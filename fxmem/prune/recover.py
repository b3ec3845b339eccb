"""``fxmem.recover``: a smaller model learns again, block by block, from labels or from the model
that it was made from.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxmem.api import is_transformed, merge_low_rank, restore, transform
from fxmem.blocks.attach import state_of
from fxmem.blocks.optimizer import BlockAdamW
from fxmem.blocks.partition import build
from fxmem.errors import PlanError
from fxmem.frontend.inputs import without_cache
from fxmem.plan.blocks import Blocks, LowRank
from fxmem.plan.plan import Plan, Stream
from fxmem.prune.distill import Teacher
from fxmem.prune.search.session import as_batches
from fxmem.prune.shrink.gate_gradients import loss_of
from fxmem.prune.shrink.gated_submodel import on
from fxmem.prune.shrink.size_attributes import evaluating
from fxmem.prune.units.settings import count, number

WARMUP = 0.05
"""Part of the steps in which the learning rate rises."""
LR = 3e-4
TERMS = 1e-3
"""Learning rates of the active block and of the low-rank terms of the others."""


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` did.

    Attributes:
        losses: of every step.
        seconds: of all steps, compilation included.
        before: perplexity on held-out batches before; None without any.
        after: the same at the end.
    """

    losses: tuple[float, ...]
    seconds: float
    before: float | None
    after: float | None


def recover(
    small: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    lr: float = LR,
    blocks: Blocks | None = None,
    stream: Stream | None = None,
    top_k: int = 64,
    temperature: float = 1.0,
    hidden: float = 0.0,
    held_out: Sequence[Mapping[str, Any]] = (),
    progress: bool = False,
    callback: Callable[[int, float], None] | None = None,
) -> Recovery:
    """Train a smaller model in place for some steps, one block at a time and streamed.

    With a teacher the student learns its next-token distribution (`fxmem.prune.distill`), which
    needs no labels and holds the student to what the dense model knows beside the calibration text.

    Args:
        small: from `fxmem.materialize`; afterwards in the mode that it was in, and not transformed.
        teacher: the dense model, unchanged, on any device; None to learn from labels.
        batches: keyword arguments of the model; one per step, in turn.
        steps: optimizer steps.
        lr: learning rate of the active block's AdamW, after a short warm-up; falls to zero by a
            cosine, and with it the rates of ``blocks.inactive``.
        blocks: partition, visits and update of the other blocks; by default every layer has about
            one visit while low-rank terms of all others learn, which are merged at the end.
        stream: chunks of both models; automatic by default.
        top_k: the teacher's logits per token that count one by one; the others count as one.
        temperature: of the distributions.
        hidden: weight of the relative distance of hidden states of all layers; 0 for none. They are
            kept whole: layers times tokens times width.
        held_out: batches with labels whose perplexity is measured before and after.
        progress: show a progress bar with the time that is left.
        callback: called with the number of steps done and the loss.

    Raises:
        PlanError: an impossible option, a model that is transformed, no batches, or no labels where
            there is no teacher.
    """
    count("steps", steps, 1)
    count("top_k", top_k, 1)
    number("lr", lr, 0, 1e3, open_low=True)
    number("temperature", temperature, 0, 1e3, open_low=True)
    number("hidden", hidden, 0, 1e6)
    data = as_batches(batches, steps)
    if not data:
        raise PlanError("recovery without batches", advice="give one batch at least")
    if is_transformed(small):
        raise PlanError("the smaller model is transformed", advice="fxmem.restore(small) first")
    stream = stream or Stream()
    before = perplexity(small, held_out) if held_out else None
    begin = time.perf_counter()
    with _training(small, Plan(stream=stream, blocks=blocks or _by_turns(small, steps))), (
        _teaching(teacher, stream)
    ):  # fmt: skip
        guide = None if teacher is None else Teacher(teacher, top_k, temperature, hidden)
        losses = _train(small, guide, data, steps, lr, progress, callback)
    seconds = time.perf_counter() - begin
    after = perplexity(small, held_out) if held_out else None
    return Recovery(tuple(losses), seconds, before, after)


def _by_turns(model: nn.Module, steps: int) -> Blocks:
    """Every layer has about one visit; all other layers learn too."""
    terms = LowRank(lr=TERMS)
    layers = len(build(model, Blocks()).blocks)
    return Blocks(steps=max(1, round(steps / layers)), inactive=terms, reach="all")


def _train(
    small: nn.Module, guide: Teacher | None, data: Sequence[Mapping[str, Any]], steps: int,
    lr: float, progress: bool, callback: Callable[[int, float], None] | None,
) -> list[float]:  # fmt: skip
    optimizer = BlockAdamW(small, lr=lr, weight_decay=0.0, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(done, steps))
    device = next(small.parameters()).device
    losses = []
    for step in _bar(range(steps), progress):
        batch = data[step % len(data)]
        if guide is None:
            loss = loss_of(small(**without_cache(small, on(device, batch))))
        else:
            loss = guide.loss(small, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if callback is not None:
            callback(step + 1, losses[-1])
    return losses


def _rate(done: int, steps: int) -> float:
    rise = max(1, round(WARMUP * steps))
    return min(1.0, (done + 1) / rise) * 0.5 * (1 + math.cos(math.pi * done / steps))


@contextlib.contextmanager
def _training(small: nn.Module, plan: Plan) -> Iterator[None]:
    with evaluating(small):  # which puts every module's own mode back
        transform(small.train(), plan)
        try:
            yield
            if state_of(small).adapters:
                merge_low_rank(small)
        finally:
            restore(small)
            small.zero_grad()


@contextlib.contextmanager
def _teaching(teacher: nn.Module | None, stream: Stream) -> Iterator[None]:
    """The teacher in chunks, in evaluation mode; afterwards as it was."""
    if teacher is None:
        yield
        return
    mine = not is_transformed(teacher)
    with evaluating(teacher):
        if mine:
            transform(teacher, Plan(stream=stream))
        try:
            yield
        finally:
            if mine:
                restore(teacher)


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """exp of the mean loss over batches with labels, in evaluation mode."""
    device = next(model.parameters()).device
    with evaluating(model):
        losses = [float(loss_of(model(**without_cache(model, on(device, b))))) for b in batches]
    return math.exp(min(700.0, sum(losses) / len(losses)))


def _bar(steps: range, shown: bool) -> Iterable[int]:
    if not shown:
        return steps
    from rich.progress import track

    return track(steps, description="recovering")


__all__ = ["Recovery", "perplexity", "recover"]
