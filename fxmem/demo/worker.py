"""Job: train with one setup and measure it; the demo starts one process per setup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from fxmem.demo.models import enable_checkpointing, load_model
from fxmem.measure.live import HighWater, parameter_bytes
from fxmem.measure.subprocess_job import serve
from fxmem.measure.training_run import Trial, run_trial, save_gradients
from fxmem.optional import UsageError

SETUPS = {
    "plain": "plain autograd",
    "checkpoint": "checkpointing",
    "fxmem": "fxmem",
    "budget": "fxmem in budget",
}
"""Setup names and what they are called in tables and pictures."""

EXACT = "exact"
"""Not a setup: float64 throughout, the yardstick for everyone's gradients."""


def train(request: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train on ``request["ids"]``; see :func:`fxmem.demo.run.request_for` for the other fields."""
    high_water = HighWater()
    torch.manual_seed(0)
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    emit({"event": "loading"})
    ids = torch.tensor([request["ids"]])
    if request["setup"] == EXACT:
        return save_exact(request["model"], ids, Path(request["gradients"]))
    model = load_model(request["model"], torch.float32)
    model.config.use_cache = False
    model = prepare(model, request["setup"], request["chunk"], request["memory"])
    named = list(model.named_parameters())
    optimizer = make_optimizer(request["optimizer"], [p for _, p in named], request["lr"])

    def loss_fn() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    gradients = request["gradients"] and Path(request["gradients"])
    trial = Trial(request["steps"], gradients or None)
    figures = run_trial(trial, loss_fn, named, optimizer.step, high_water, emit)
    return {"parameters": parameter_bytes(model), "threads": torch.get_num_threads(), **figures}


def save_exact(name: str, ids: torch.Tensor, path: Path) -> dict[str, Any]:
    """Write the gradients of one float64 step, with checkpointing, which changes no value.

    The logits leave the model for the loss: the one inside is taken in float32 whatever the
    model's type, which costs more than everything else that is rounded.
    """
    model = load_model(name, torch.float64)
    model.config.use_cache = False
    enable_checkpointing(model)
    F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
    save_gradients(model.named_parameters(), path)
    return {}


def prepare(
    model: Any, setup: str, chunk: int | Literal["auto"] = "auto", memory: int | str = "auto"
) -> Any:
    """The model to train in this setup; ``memory``: of the one that has a budget.

    Raises:
        UsageError: an unknown setup.
    """
    if setup == "plain":
        return model
    if setup == "checkpoint":
        enable_checkpointing(model)
        return model
    if setup in ("fxmem", "budget"):
        import fxmem

        memory = memory if setup == "budget" else "least"
        stream = fxmem.Stream(chunk=chunk, memory=memory)
        return fxmem.transform(model, fxmem.Plan(stream=stream))
    raise UsageError(f"unknown setup {setup!r}", advice=f"one of {', '.join(SETUPS)}")


def make_optimizer(
    name: str, parameters: list[torch.nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """SGD without state, or fused AdamW; both update in place, without weight-sized temporaries.

    Raises:
        UsageError: another name.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, foreach=False)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    raise UsageError(f"unknown optimizer {name!r}", advice="sgd or adamw")


if __name__ == "__main__":
    serve(train)
