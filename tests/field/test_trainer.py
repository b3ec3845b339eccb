"""transformers' Trainer, unmodified, with the options people set: the weights of plain runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from double import everything_in_double, largest_difference
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune

import fxmem
from fxmem import Plan, Stream
from fxmem.runtime.counters import COUNTER

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.field,
]
PLAN = Plan(stream=Stream(chunk=8))
Rows = list[dict[str, Any]]


def rows() -> Rows:
    """Six lengths, ids and labels as lists, as a tokenizer gives them."""
    found = []
    for n in (23, 40, 31, 40, 17, 29, 23, 36):
        one = {k: v[0].tolist() for k, v in tiny.batch(1, n).items()}
        found.append({"input_ids": one["input_ids"], "labels": one["labels"]})
    return found


def collate(batch: Rows) -> dict[str, Tensor]:
    """Padded to the longest of the batch."""
    longest = max(len(r["input_ids"]) for r in batch)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in batch])

    ids = padded("input_ids", 0)
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"]))
                         for r in batch])  # fmt: skip
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": mask}


def by_hand(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` of the user's own."""
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits / 1.5, labels[:, 1:].flatten())


def accuracy(given: Any) -> dict[str, float]:
    logits, labels = given
    return {"accuracy": float((logits.argmax(-1)[:, :-1] == labels[:, 1:]).mean())}


def accuracy_of_chosen(given: Any) -> dict[str, float]:
    chosen, labels = given
    return {"accuracy": float((chosen[:, :-1] == labels[:, 1:]).mean())}


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smoothed": ({"label_smoothing_factor": 0.1}, {}),
    "own loss": ({}, {"compute_loss_func": by_hand}),
    "accumulated": ({"gradient_accumulation_steps": 2}, {}),
    "checkpointed": ({"gradient_checkpointing": True}, {}),
    "evaluated": (
        {"eval_strategy": "steps", "eval_steps": 1},
        {"eval_dataset": rows()[:4], "compute_metrics": accuracy},
    ),
    "predicted": (
        {"eval_strategy": "steps", "eval_steps": 1},
        {
            "eval_dataset": rows()[:4],
            "compute_metrics": accuracy_of_chosen,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
    ),
    "flattened": ({}, {"data_collator": tf.DataCollatorWithFlattening()}),
    "clipped": ({"max_grad_norm": 0.5}, {}),
}


def trained(
    folder: Path, name: str, callbacks: list[Any], resume: str | None = None, **changes: Any
) -> Any:
    arguments, given = OPTIONS[name]
    model = tiny.model("llama")
    model.config.use_cache = False
    args = tf.TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=0.1, optim="sgd",
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        remove_unused_columns=False, **{"save_strategy": "no", **arguments, **changes},
    )  # fmt: skip
    trainer = tf.Trainer(
        model=model, args=args, train_dataset=rows(), callbacks=callbacks,
        **{"data_collator": collate, **given},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    logs = [{k: v for k, v in log.items() if "loss" in k or "accuracy" in k}
            for log in trainer.state.log_history]  # fmt: skip
    return weights, logs, trainer.model


@pytest.mark.parametrize("name", OPTIONS)
def test_the_weights_of_a_plain_run(tmp_path: Path, name: str) -> None:
    want, told, _ = trained(tmp_path, name, [])
    got, tells, model = trained(tmp_path, name, [fxmem.TrainerCallback(PLAN)])
    assert fxmem.explain(model).executed_bodies > 0
    largest = max(float(w.abs().max()) for w in want.values())
    assert largest_difference(got, want)[0] < 2e-6 * max(1.0, largest)
    for one, two in zip(tells, told, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"train_loss"}:
            assert abs(one[key] - two[key]) < 1e-5 * max(1.0, abs(two[key])), key


def test_bfloat16(tmp_path: Path) -> None:
    """Autocast rounds as much as it does in a plain run, and no more."""
    exact, *_ = trained(tmp_path, "clipped", [])
    plain, *_ = trained(tmp_path, "clipped", [], bf16=True)
    streamed, *_ = trained(tmp_path, "clipped", [fxmem.TrainerCallback(PLAN)], bf16=True)
    errors = [sum(float((net[n] - w).square().sum()) for n, w in exact.items()) ** 0.5
              for net in (plain, streamed)]  # fmt: skip
    assert 0 < errors[1] <= 1.1 * errors[0]


def test_a_resumed_run(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [fxmem.TrainerCallback(PLAN)]):
        folder = tmp_path / str(len(callbacks))
        saved = {"save_strategy": "steps", "save_steps": 2}
        whole, *_ = trained(folder, "accumulated", callbacks, **saved)
        resumed, *_ = trained(folder, "accumulated", callbacks, str(folder / "checkpoint-2"))
        assert largest_difference(resumed, whole)[0] == 0.0
        found.append(resumed)
    assert largest_difference(found[1], found[0])[0] < 2e-6


@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_the_backend_by_name(tmp_path: Path, mode: str | None) -> None:
    want, told, _ = trained(tmp_path, "evaluated", [])
    before = COUNTER.captures
    got, tells, _ = trained(
        tmp_path, "evaluated", [], torch_compile_backend="fxmem", torch_compile_mode=mode
    )
    assert COUNTER.captures > before
    assert largest_difference(got, want)[0] < 2e-6
    assert [log.keys() for log in tells] == [log.keys() for log in told]


@pytest.mark.parametrize("embedding", ["llama", "gpt2"])
def test_noise_on_the_embeddings(embedding: str) -> None:
    """NEFTune: the gradients are those of a plain model that is given the noise."""
    alpha, length = 3.0, 24
    with everything_in_double():
        plain = tiny.model(embedding).double()
        streamed = copy.deepcopy(plain)
        activate_neftune(streamed, alpha)
        fxmem.transform(streamed, PLAN)
        ids = tiny.batch(2, length)["input_ids"]
        torch.manual_seed(3)
        out = streamed(input_ids=ids, labels=ids, output_hidden_states=True)
        out.loss.backward()
        table = plain.get_input_embeddings()
        with torch.no_grad():  # GPT-2 adds positions
            clean = plain(input_ids=ids, output_hidden_states=True).hidden_states[0]
        noise = out.hidden_states[0].detach() - clean
        bound = alpha / (length * 32) ** 0.5
        assert 0.9 * bound < noise.abs().max() < bound * (1 + 1e-6)
        assert abs(noise.std() / bound - 3**-0.5) < 0.05 and abs(noise.mean()) < 0.1 * bound
        plain(inputs_embeds=table(ids) + noise, labels=ids).loss.backward()
        grads = [{n: p.grad for n, p in net.named_parameters()} for net in (streamed, plain)]
    assert largest_difference(*grads)[0] < 1e-10


def test_a_model_made_by_the_trainer_is_transformed(tmp_path: Path) -> None:
    """``model_init`` makes a new model for every run."""
    made: list[nn.Module] = []

    def init() -> nn.Module:
        made.append(tiny.model("llama"))
        return made[-1]

    args = tf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = tf.Trainer(
        model_init=init, args=args, train_dataset=rows(), data_collator=collate,
        callbacks=[fxmem.TrainerCallback(PLAN)],
    )  # fmt: skip
    for _ in range(2):
        trainer.train()
        assert fxmem.explain(made[-1]).executed_bodies > 0
    assert len(made) >= 2


RECORDED: dict[str, tuple[str, dict[str, Any], Callable[[Any], Tensor]]] = {
    "hidden states": (
        "llama",
        {"output_hidden_states": True},
        lambda out: out.loss + sum(h.square().mean() for h in out.hidden_states[1:]),
    ),
    "attentions": (
        "llama",
        {"output_attentions": True},
        lambda out: out.loss + sum(a.square().mean() for a in out.attentions),
    ),
    "router logits": ("mixtral", {"output_router_logits": True}, lambda out: out.loss),
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_recorded_outputs(name: str, by: str) -> None:
    kind, asked, loss = RECORDED[name]
    found = []
    with everything_in_double():
        for streamed in (False, True):
            model = tiny.model(kind, **(asked if by == "configuration" else {})).double()
            if name == "attentions":
                model.set_attn_implementation("eager")
            if streamed:
                fxmem.transform(model, PLAN)
            given = asked if by == "argument" else {}
            for length in (23, 30):
                value = loss(model(**tiny.batch(2, length, "left"), **given))
                value.backward()
            found.append(({n: p.grad for n, p in model.named_parameters()}, float(value)))
    (want, plain), (got, streamed_loss) = found
    assert abs(plain - streamed_loss) < 1e-10
    assert largest_difference(got, want)[0] < 1e-10
