"""Job: one setup, one objective, one length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.objectives import ALL
from benchmarks.setups import SETUPS, build
from fxmem.demo.models import RANDOM, load_model, load_tokenizer
from fxmem.demo.text import token_ids
from fxmem.measure.live import HighWater, parameter_bytes
from fxmem.measure.subprocess_job import serve
from fxmem.measure.training_run import Trial, run_trial


def measure(request: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Warm up once, time ``request["steps"]`` steps at unchanged weights, record one more."""
    high_water = HighWater()
    torch.set_num_threads(request["threads"])
    model = load_model(request["model"])
    model.config.use_cache = False
    ids = make_ids(request["model"], model.config, request["objective"], request["length"])
    ids = as_view(ids) if request["ids"] == "view" else ids
    setup = SETUPS[request["setup"]]
    loss_fn = build(setup, model, request["objective"], ids, request["chunk"])
    gradients = request["gradients"] and Path(request["gradients"])
    trial = Trial(steps=request["steps"] + 1, gradients=gradients or None, points=600)
    named = list(model.named_parameters())
    figures = run_trial(trial, loss_fn, named, lambda: None, high_water, emit)
    return {"parameters": parameter_bytes(model), **figures}


def make_ids(model: str, config: Any, objective: str, length: int) -> torch.Tensor:
    """Ids [rows, length / rows]: random for models with random weights, real text for others."""
    _, rows = ALL[objective]
    each = length // rows
    vocabulary = config.get_text_config().vocab_size
    if model in RANDOM:
        return torch.randint(vocabulary, (rows, each))
    return token_ids(rows * each, load_tokenizer(model), vocabulary).reshape(rows, each)


def as_view(ids: torch.Tensor) -> torch.Tensor:
    """The same ids as part of a longer text: an offset, and the strides of the whole."""
    text = torch.cat([ids[:, -3:], ids, ids[:, :3]], 1)
    return text[:, 3:-3]


if __name__ == "__main__":
    serve(measure)
