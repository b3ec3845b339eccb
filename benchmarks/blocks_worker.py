"""Job of ``benchmarks.blocks``: one setup in one process, for its time, memory or learning."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxmem
from benchmarks.blocks_live import LiveGradients, bound
from benchmarks.blocks_setups import Rates, Training, build, evaluate
from fxmem.blocks.attach import state_of
from fxmem.demo.models import TINY, load_model, load_tokenizer
from fxmem.demo.text import long_text
from fxmem.measure.live import parameter_bytes, track
from fxmem.measure.subprocess_job import serve
from fxmem.optional import UsageError

Emit = Callable[[dict[str, Any]], None]
WARM = 3
"""Steps before the timed ones: after them, every variant of every region has run."""
HELD_OUT = 8
"""One window in so many is held out."""


def measure(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Figures of one part: ``time``, ``memory`` or ``learning``."""
    torch.set_num_threads(request["threads"])
    emit({"event": "loading"})
    model = load_model(request["model"])
    model.config.use_cache = False
    length = request["length"]
    windows = text_windows(request["model"], request["data"], length, model.config)
    part = {"time": _time, "memory": _memory, "learning": _learning}[request["part"]]
    return {"parameters": parameter_bytes(model), **part(request, model, windows, emit)}


def _blocks(request: dict[str, Any], **changes: Any) -> fxmem.Blocks:
    options = {"layers_per_block": request["layers_per_block"], "seed": request["seed"]}
    return fxmem.Blocks(**{**options, **changes})


def _time(request: dict[str, Any], model: Any, windows: Tensor, emit: Emit) -> dict[str, Any]:
    """Seconds per step; with blocks, one step on each block after the warm-up."""
    base = _blocks(request, order="ascending", steps=1)
    training = build(request["setup"], model, base, Rates(**request["rates"]))
    count = training.count if training.count > 1 else request["steps"]
    seconds, losses, first = [], [], 0.0
    for i in range(WARM + count):
        ids = windows[i % len(windows)][None]
        began = time.perf_counter()
        losses.append(training.step(ids))
        spent = time.perf_counter() - began
        emit({"event": "step", "step": i + 1, "of": WARM + count, "seconds": spent})
        first = first or spent
        if i >= WARM:
            seconds.append(spent)
    mean = statistics.mean(seconds)
    return {"seconds": seconds, "mean_seconds": mean, "first_seconds": first, "losses": losses}


def _memory(request: dict[str, Any], model: Any, windows: Tensor, emit: Emit) -> dict[str, Any]:
    """Peaks of a step in the middle of a visit of the first block, the one that saves most."""
    base = _blocks(request, order="fixed", steps=1000)
    training = build(request["setup"], model, base, Rates(**request["rates"]))
    for i in range(2):
        training.step(windows[i % len(windows)][None])
        emit({"event": "step", "step": i + 1, "of": 4})
    state = training.state_bytes()
    curve = track(lambda: training.step(windows[0][None]))
    emit({"event": "step", "step": 3, "of": 4})
    weights = [*training.model.parameters(), *training.terms]
    live = LiveGradients(weights, training.state())
    loss = training.forward(windows[1 % len(windows)][None])
    with live:
        loss.backward()
        training.update()
    return {
        "state_bytes": state,
        "peak": state + curve.peak,
        "live_gradients": live.peak,
        "allowed": _allowed(training),
        "adapter_bytes": 4 * sum(p.nbytes for p in training.terms),
    }


def _allowed(training: Training) -> int | None:
    """What block training with SGD may hold: the active block's share and one gradient."""
    try:
        blocks = state_of(training.model)
    except fxmem.FxmemError:
        return None
    weights = dict(training.model.named_parameters())
    updates = [n for n, p in weights.items() if blocks.role(p).value == "update"]
    own = sum(3 * p.nbytes for p in training.terms)
    return bound(weights, blocks.active, updates) + own


def _learning(request: dict[str, Any], model: Any, windows: Tensor, emit: Emit) -> dict[str, Any]:
    """Held-out loss along a run of ``steps``; the seed gives the order of windows and blocks."""
    base = _blocks(request, order="random", steps=request["visit"])
    torch.manual_seed(request["seed"])  # badam and peft draw from the global generator
    training = build(request["setup"], model, base, Rates(**request["rates"]))
    held_out, learned = split(windows)
    held_out = held_out[: request["held_out"]]
    order = torch.Generator().manual_seed(request["seed"])
    rows = learned[torch.randperm(len(learned), generator=order)]
    curve = [(0, evaluate(training.model, held_out))]
    steps, batch = request["steps"], request["batch"]
    losses = []
    for i in range(steps):
        at = torch.arange(i * batch, (i + 1) * batch) % len(rows)
        losses.append(training.step(rows[at]))
        emit({"event": "step", "step": i + 1, "of": steps, "loss": losses[-1]})
        if (i + 1) % request["every"] == 0 or i + 1 == steps:
            curve.append((i + 1, evaluate(training.model, held_out)))
    return {
        "curve": curve, "losses": losses, "final": curve[-1][1], "windows": len(rows),
        "state_bytes": training.state_bytes(),
    }  # fmt: skip


def split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Held-out windows, spread over the text, and the others."""
    at = torch.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
    if not at.any():
        raise UsageError("the text is too short to hold windows out", advice="shorten the windows")
    return windows[at], windows[~at]


def text_windows(model: str, data: str | None, length: int, config: Any) -> Tensor:
    """Ids [windows, length] of a text from its start; bytes are the tokens of "tiny".

    Raises:
        UsageError: the text is shorter than one window.
    """
    text = long_text() if data is None else read(Path(data))
    if model == TINY:
        ids = list(text[: 64 * length].encode())
    else:
        tokenizer = load_tokenizer(model)
        assert tokenizer is not None
        ids = tokenizer(text)["input_ids"]
    count = len(ids) // length
    if not count or max(ids) >= config.get_text_config().vocab_size:
        raise UsageError("the text has no window of this length for this model")
    return torch.tensor(ids[: count * length]).view(count, length)


def read(path: Path) -> str:
    """A text file, or the strings of a file of JSON lines, example after example."""
    text = path.read_text()
    if path.suffix != ".jsonl":
        return text
    rows = [json.loads(line) for line in text.splitlines() if line]
    return "\n\n".join("\n".join(str(v) for v in row.values()) for row in rows)


if __name__ == "__main__":
    serve(measure)
