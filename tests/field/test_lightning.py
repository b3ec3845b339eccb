"""Lightning's Trainer, unmodified, on a module whose inner model is transformed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import tiny
import torch
import transformers as tf
from double import largest_difference
from torch import Tensor
from torch.utils.data import DataLoader

import fxmem
from fxmem import Plan, Stream

PLAN = Plan(stream=Stream(chunk=8))
BATCHES: Any = [tiny.batch(2, n) for n in (23, 31, 24)]


class Module(lightning.LightningModule):
    """``how``: where the model is transformed."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.model = how, tiny.model()
        if how == "in __init__":
            fxmem.transform(self.model, PLAN)

    def configure_model(self) -> None:
        if self.how == "in configure_model" and not fxmem.api.is_transformed(self.model):
            fxmem.transform(self.model, PLAN)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        out = self.model(**batch)
        right = out.logits.argmax(-1) == batch["input_ids"]
        self.log_dict({"loss": out.loss, "right": right.float().mean()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Transform(lightning.Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        fxmem.transform(pl_module.model, PLAN)


def trained(how: str, callbacks: list[lightning.Callback]) -> tuple[Module, dict[str, Any]]:
    module = Module(how)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    loader: Any = DataLoader(BATCHES, batch_size=None)
    trainer.fit(module, loader, DataLoader(BATCHES[:2], batch_size=None))
    return module, dict(trainer.callback_metrics)


@pytest.mark.field
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["in __init__", "in configure_model", "by a callback"])
def test_weights_and_metrics_of_a_plain_run(how: str) -> None:
    want, told = trained("", [])
    got, tells = trained(how, [Transform()] if how == "by a callback" else [])
    assert fxmem.explain(got.model).executed_bodies > 0
    weights = [{n: p.detach() for n, p in m.named_parameters()} for m in (got, want)]
    assert largest_difference(*weights)[0] < 2e-6
    assert tells.keys() == told.keys()
    assert all(abs(tells[k] - told[k]) < 1e-5 for k in told)


def test_the_module_itself_is_refused() -> None:
    """Lightning calls ``training_step``, so its forward is not what trains."""
    module = Module()
    with pytest.raises(fxmem.PlanError, match=r"fxmem.transform\(model.model, plan\)"):
        fxmem.transform(module, PLAN)
    assert not fxmem.api.is_transformed(module)


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    args = tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer: Any = tf.Trainer(model=tiny.model(), args=args)
    with pytest.raises(fxmem.PlanError, match=r"Trainer is no .*fxmem.transform\(it.model, plan\)"):
        fxmem.transform(trainer, PLAN)
    name: Any = "gpt2"
    with pytest.raises(fxmem.PlanError, match="str is no .*give the model itself"):
        fxmem.transform(name, PLAN)
