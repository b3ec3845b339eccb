"""``fxmem.TrainerCallback``: streaming by one argument of transformers' Trainer and its heirs."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import trainer_callback as library

from fxmem.api import is_transformed, transform
from fxmem.plan.plan import Plan


class TrainerCallback(library.TrainerCallback):
    """Transforms the model of a trainer: ``Trainer(..., callbacks=[fxmem.TrainerCallback(plan)])``.

    The model is transformed when the trainer is made, before anything wraps it, and again where the
    trainer makes a new one (``model_init``, a search over hyper-parameters). Without a plan it
    streams with automatic chunks.

    Raises:
        PlanError: the plan cannot work with the model.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Transform the trainer's model."""
        model = given.get("model")
        if isinstance(model, nn.Module):
            transform(model, self.plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Transform a model that was made since."""
        model = given.get("model")
        if isinstance(model, nn.Module) and not is_transformed(model):
            transform(model, self.plan)
