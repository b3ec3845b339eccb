"""Adapters of peft on a model, transformed as a whole: exact, and frozen weights get nothing."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
HEADS = {**TASK, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **HEADS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **HEADS),
    "embeddings and head": lambda: peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "lm_head"], **TASK
    ),
    "modules to save": lambda: peft.LoraConfig(
        r=2, modules_to_save=["lm_head", "embed_tokens"], **HEADS
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **TASK),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=16, **TASK
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK),
}
DEFAULT = ("dora", "prompt")


def gradients(net: nn.Module, length: int) -> dict[str, Tensor]:
    net.zero_grad()
    ids = torch.arange(3, 3 + 2 * length).reshape(2, length) % tiny.VOCAB
    net(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind", [k if k in DEFAULT else pytest.param(k, marks=pytest.mark.field) for k in KINDS]
)
def test_gradients(kind: str) -> None:
    with everything_in_double():
        plain = peft.get_peft_model(tiny.model("llama"), KINDS[kind]()).double()
        for p in plain.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.05)
        streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=7, loss_chunk=5)))
        for length in (23, 31):
            want, got = gradients(plain, length), gradients(streamed, length)
            assert set(got) == set(want)
            assert largest_difference(got, want)[0] <= 1e-10
        assert fxmem.explain(streamed).executed_bodies
