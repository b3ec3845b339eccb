"""TRL's trainers, unmodified, on a transformed model: the weights of the same run without fxmem."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.runtime.counters import COUNTER

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental import a2po, cpo, gkd, gmpo, orpo, tpo  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
WORDS = [f"w{i}" for i in range(80)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} "
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)
NAMES = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}


def tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel(NAMES, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template=TEMPLATE,
    )  # fmt: skip


def dataset(row: Callable[[int, Callable[[int, int], str]], dict[str, Any]]) -> Dataset:
    """Sixteen rows; ``row`` is given its index and what draws a text of so many words."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return Dataset.from_list([row(i, text) for i in range(16)])


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c) % 7) for c in completions]


def preference(_: int, text: Callable[[int, int], str]) -> dict[str, str]:
    return {"prompt": text(5, 9), "chosen": text(8, 14), "rejected": text(8, 14)}


def dialogue(_: int, text: Callable[[int, int], str]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text(5, 9)},
                         {"role": "assistant", "content": text(8, 14)}]}  # fmt: skip


def prompt(_: int, text: Callable[[int, int], str]) -> dict[str, str]:
    return {"prompt": text(5, 9)}


def teacher() -> nn.Module:
    """Not the student: without a difference the gradient is rounding alone."""
    net, draw = tiny.model("llama", vocab_size=len(NAMES), pad_token_id=0), torch.Generator()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw.manual_seed(9)))
    return net


SAMPLED = {"num_generations": 2, "max_completion_length": 12}
KINDS: dict[str, tuple[Any, Any, Any, dict[str, Any], dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, lambda i, t: {"text": t(20, 40)}, {}, {}),
    "dialogue": (trl.SFTTrainer, trl.SFTConfig, dialogue, {"assistant_only_loss": True}, {}),
    "completion": (
        trl.SFTTrainer, trl.SFTConfig, lambda i, t: {"prompt": t(5, 9), "completion": t(8, 14)},
        {}, {},
    ),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, preference, {}, {}),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, preference, {}, {}),
    "cpo": (cpo.CPOTrainer, cpo.CPOConfig, preference, {}, {}),
    "reward": (trl.RewardTrainer, trl.RewardConfig, preference, {}, {}),
    "kto": (
        trl.KTOTrainer, trl.KTOConfig,
        lambda i, t: {"prompt": t(5, 9), "completion": t(8, 14), "label": bool(i % 2)}, {}, {},
    ),
    "grpo": (
        trl.GRPOTrainer, trl.GRPOConfig, prompt, SAMPLED, {"reward_funcs": reward},
    ),
    "rloo": (
        trl.RLOOTrainer, trl.RLOOConfig, prompt, SAMPLED, {"reward_funcs": reward},
    ),
    "gmpo": (gmpo.GMPOTrainer, gmpo.GMPOConfig, prompt, SAMPLED, {"reward_funcs": reward}),
    "a2po": (
        a2po.A2POTrainer, a2po.A2POConfig, prompt, {"max_completion_length": 8},
        {"reward_funcs": reward},
    ),
    "tpo": (
        tpo.TPOTrainer, tpo.TPOConfig, lambda i, t: {**preference(i, t), "reference": t(8, 14)},
        {}, {},
    ),
    "gkd": (
        gkd.GKDTrainer, gkd.GKDConfig, dialogue, {"max_new_tokens": 8}, {"teacher_model": teacher},
    ),
    "distillation": (
        trl.DistillationTrainer, trl.DistillationConfig, prompt, {"max_completion_length": 8},
        {"teacher_model": teacher},
    ),
}  # fmt: skip
"""Trainer, its configuration, a row of its data, options, further arguments."""
ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "sft": ("sft", {}, None),
    "sft, label smoothing": ("sft", {"label_smoothing_factor": 0.1}, None),
    "sft, packed": ("sft", {"packing": True, "max_length": 32}, None),
    "sft, adapter": ("sft", {}, ADAPTER),
    "sft, assistant only": ("dialogue", {}, None),
    "sft, experts": ("sft", {}, None),
    "sft, completion only": ("completion", {}, None),
    "dpo": ("dpo", {}, None),
    "dpo, adapter": ("dpo", {}, ADAPTER),
    "dpo, accumulated": ("dpo", {"gradient_accumulation_steps": 2}, None),
    "orpo": ("orpo", {}, None),
    "cpo": ("cpo", {}, None),
    "reward": ("reward", {}, None),
    "kto": ("kto", {}, None),
    "grpo": ("grpo", {}, None),
    "grpo, adapter": ("grpo", {}, ADAPTER),
    # without a reward the gradient is rounding alone, which AdamW would blow up
    "grpo, divergence": ("grpo", {"beta": 0.1, "optim": "sgd", "learning_rate": 0.1}, None),
    "rloo": ("rloo", {}, None),
    "gmpo": ("gmpo", {}, None),
    "a2po": ("a2po", {}, None),
    "tpo": ("tpo", {}, None),
    "gkd": ("gkd", {}, None),
    "distillation": ("distillation", {}, None),
    "dpo, three losses": ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"]}, None),
    "dpo, without padding": ("dpo", {"padding_free": True}, None),
    "dpo, weighted": ("dpo", {"use_weighting": True}, None),
    "grpo, of sequences": ("grpo", {"importance_sampling_level": "sequence"}, None),
    "grpo, entropy": ("grpo", {"entropy_coef": 0.01, "top_entropy_quantile": 0.5}, None),
}


def trained(
    name: str, stream: bool, start: Path, folder: Path
) -> tuple[dict[str, Tensor], nn.Module]:
    kind, options, adapter = CASES[name]
    trainer, config, row, fixed, more = KINDS[kind]
    if kind == "reward":
        kinds: Any = partial(tf.AutoModelForSequenceClassification.from_pretrained, num_labels=1)
    else:
        kinds = tf.AutoModelForCausalLM.from_pretrained
    torch.manual_seed(0)
    net = kinds(start, dtype=torch.float32)
    if stream:
        fxmem.transform(net, Plan(stream=Stream(chunk=8, loss_chunk=8)))
    if adapter is not None:
        more = {**more, "peft_config": LoraConfig(**adapter)}
    more = {k: v() if v is teacher else v for k, v in more.items()}
    args = config(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", **{"learning_rate": 1e-3, **fixed, **options},
    )  # fmt: skip
    run = trainer(
        model=net, args=args, train_dataset=dataset(row), processing_class=tokenizer(), **more
    )
    torch.manual_seed(1)
    run.train()
    return {n: p.detach() for n, p in run.model.named_parameters()}, net


DEFAULT = ("sft", "dpo, adapter")
WHOLE = ("reward", "sft, experts", "a2po", "tpo", "distillation")
"""The head of a reward model reads one row per sequence; tokens are counted for each expert; rows
are cut out of the last hidden states, which moves no more than these; TPO reads a third of the
batch apart.
"""


@pytest.mark.parametrize(
    "name",
    [n if n in DEFAULT else pytest.param(n, marks=(pytest.mark.field,)) for n in CASES],
)
def test_weights_after_three_steps(name: str, tmp_path: Path) -> None:
    start = tmp_path / "start"
    kind = "mixtral" if "experts" in name else "llama"
    tiny.model(kind, vocab_size=len(NAMES), pad_token_id=0).save_pretrained(start)
    want, _ = trained(name, False, start, tmp_path / "plain")
    before = COUNTER.captures
    got, net = trained(name, True, start, tmp_path / "streamed")
    # trainers switch checkpoints off and on at every step; TPO's metrics read thirds of the batch
    assert COUNTER.captures - before <= 4 + (name == "tpo")
    report = fxmem.explain(net)
    assert report.executed_bodies
    assert not report.barriers or name in WHOLE
    for key, weight in want.items():
        # AdamW divides by the root of tiny second moments
        assert (got[key] - weight).norm() <= 5e-6 * weight.norm(), key
