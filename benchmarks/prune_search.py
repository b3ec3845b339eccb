"""The rows of the pruning benchmark that search: masks, what they cost, and how they got there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fxmem

POINTS = 6
"""Masks on the way whose held-out loss is measured; that is not part of what a search spends."""


def variant(kind: str, how: fxmem.Prune) -> fxmem.Prune:
    """The ways of a search that the benchmark compares.

    ``fresh``: new sub-models every step. The others use theirs for up to `age` steps: ``stale``
    without the ratios of other units, ``un-nested`` with them, ``re-weighted``, which is what
    `fxmem.search` does, with new masks every step inside the sub-models as well.
    """
    if kind == "fresh":
        return replace(how, age=1, widen=1.0)
    if kind == "re-weighted":
        return how
    return replace(how, widen=1.0, scope="none" if kind == "stale" else "layer")


def search(
    model: nn.Module,
    coupled: fxmem.Coupling,
    batches: Sequence[Mapping[str, Any]],
    how: fxmem.Prune,
    importance: Mapping[str, Tensor],
    *,
    state: Path,
    judge: Callable[[fxmem.Masks], float],
    say: Callable[[str], None],
) -> tuple[fxmem.Masks, dict[str, Any]]:
    """Run one search, or what is left of it, and report what it spent.

    Args:
        batches: all of one shape.
        state: file of the unfinished search.
        judge: held-out loss of a mask.
        say: told about every step.
    """
    way = state.with_suffix(".curve.json")
    curve = json.loads(way.read_text()) if state.exists() and way.exists() else []

    def watch(step: Any) -> None:
        text = f"step {step.step} of {how.steps}, mean loss of the sub-models {step.loss:.3f}"
        if step.step % max(1, how.steps // POINTS) == 0:
            value = judge(fxmem.Masks.from_bools(coupled, step.bools()))
            curve.append((step.step, step.counts.instantiations, value))
            way.write_text(json.dumps(curve))
            text += f"; mask so far: {value:.3f} held out"
        say(text)
        last.append(step)

    last: list[Any] = []
    masks = fxmem.search(
        model, batches, how, callback=watch, coupled=coupled, importance=importance,
        checkpoint=state,
    )  # fmt: skip
    counts = last[-1].counts
    state.unlink()
    return masks, {
        "steps": last[-1].step,
        "instantiations": counts.instantiations,
        "submodels": counts.submodels,
        "built_size": counts.size / counts.submodels,
        "forwards": counts.forwards,
        "tokens": counts.forwards * batches[0]["input_ids"].numel(),
        "instantiate_ms": 1e3 * counts.building / counts.submodels,
        "forward_ms": 1e3 * counts.running / counts.forwards,
        "sampled": counts.losses,
        "curve": curve,
        "ess": counts.ess,
        "clipped": sum(counts.clipped) / max(1, len(counts.clipped)),
        "find_seconds": counts.building + counts.running,
    }
