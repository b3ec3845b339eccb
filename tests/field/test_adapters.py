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
    "experts": lambda: peft.LoraConfig(
        r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], **HEADS
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, **HEADS
    ),
    "oft": lambda: peft.OFTConfig(r=2, oft_block_size=0, **HEADS),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[1, 2, 3], **HEADS),
    "layer norms": lambda: peft.LNTuningConfig(**TASK),
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
        base = tiny.model("qwen3_moe" if kind == "experts" else "llama")
        plain = peft.get_peft_model(base, KINDS[kind]()).double()
        for p in plain.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.05)
        streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=7, loss_chunk=5)))
        for length in (23, 31):
            want, got = gradients(plain, length), gradients(streamed, length)
            assert set(got) == set(want)
            assert largest_difference(got, want)[0] <= 1e-10
        report = fxmem.explain(streamed)
        assert report.executed_bodies
        assert not any("mm" in barrier.op for barrier in report.barriers)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_frozen_weights_have_no_gradient_in_any_program() -> None:
    net = peft.get_peft_model(tiny.model(), KINDS["lora"]())
    fxmem.transform(net, Plan(stream=Stream(chunk=7)))
    gradients(net, 23)
    made = 0
    for graph in fxmem.api._TRANSFORMED[net].graphs:
        for code in (call.code for call in graph.calls):
            weights = zip(code.region.parameter_mask, code.values, code.joint.grads, strict=True)
            assert not any(p and g is not None and not v.requires_grad for p, v, g in weights)
            made += sum(g is not None for g in code.joint.grads)
    assert made > 4  # of the adapters, and of the states between


@pytest.mark.field
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_several_adapters_switched_merged_and_unloaded(kind: str) -> None:
    """Two adapters in turn, the base model as a reference between, and the merged model."""
    found = []
    with everything_in_double():
        plain = peft.get_peft_model(tiny.model(), KINDS[kind]())
        plain.add_adapter("second", KINDS[kind]())
        plain = plain.double()
        for n, p in plain.named_parameters():
            if "lora_" in n:
                p.data.add_(torch.randn_like(p) * 0.05)
        streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=7, loss_chunk=5)))
        for net in (plain, streamed):
            values: dict[str, Tensor] = {}
            for step, adapter in enumerate(("default", "second", "default")):
                net.set_adapter(adapter)
                found_now = gradients(net, 23)
                assert all(adapter in n for n in found_now)
                values |= {f"{step} {n}": g.clone() for n, g in found_now.items()}
                torch.optim.SGD(
                    [p for p in net.parameters() if p.requires_grad], 0.1
                ).step()  # fmt: skip
                with torch.no_grad(), net.disable_adapter():
                    values[f"{step} base"] = net(**tiny.batch(2, 23)).loss
            with torch.no_grad():
                values["adapted"] = net(**tiny.batch(2, 23)).loss
            merged = net.merge_and_unload()
            values |= {n: p.detach() for n, p in merged.named_parameters()}
            with torch.no_grad():
                assert abs(merged(**tiny.batch(2, 23)).loss - values["adapted"]) < 1e-10
            found.append(values)
    assert largest_difference(found[1], found[0])[0] <= 1e-10
    bases = [found[1][f"{step} base"] for step in range(3)]
    assert bases[0] == bases[1] == bases[2] != found[1]["adapted"]
