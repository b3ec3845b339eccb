"""Partitions follow module structure and cover every parameter once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from fxmem import SGD, Blocks, LowRank, Plan, SignSGD
from fxmem.blocks.partition import build, fingerprint
from fxmem.errors import PlanError

SMALL: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2}
LLAMA = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 12}
MODELS: dict[str, tuple[Any, int]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, num_hidden_layers=12)), 12),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2)), 3
    ),
    "bert": (
        lambda: tf.BertForMaskedLM(
            tf.BertConfig(**SMALL, num_hidden_layers=3, intermediate_size=12)
        ), 3,
    ),
    "mixtral": (
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**LLAMA, num_hidden_layers=3, num_local_experts=2)
        ), 3,
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
        ), 4,
    ),
    "opt": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**SMALL, num_hidden_layers=3, ffn_dim=12, word_embed_proj_dim=8)
        ), 3,
    ),
}  # fmt: skip


def make(name: str) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = MODELS[name][0]()
    return net


@pytest.mark.parametrize("outer", ["inactive", "blocks", "attach", "frozen"])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_parameter_has_one_place(name: str, outer: Any) -> None:
    net = make(name)
    parts = build(net, Blocks(outer=outer))
    layers = MODELS[name][1]
    assert len(parts.blocks) == layers + 2 * (outer == "blocks")
    placed = [n for b in parts.blocks for n in b.names] + [*parts.inactive, *parts.frozen]
    assert len(placed) == len(set(placed))
    assert set(placed) == {n for n, _ in net.named_parameters()}


def test_the_final_norm_is_in_the_head_wherever_it_is_registered() -> None:
    blocks = build(make("opt"), Blocks(outer="blocks")).blocks
    assert any("final_layer_norm" in n for n in blocks[-1].names)
    assert all("embed" in n for n in blocks[0].names)


def test_a_block_of_layers_does_not_match_longer_numbers() -> None:
    blocks = build(make("llama"), Blocks(layers_per_block=5)).blocks
    counts = [len({n.split(".")[2] for n in b.names}) for b in blocks]
    assert counts == [5, 5, 2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"partition": (("model.layers.0",),)}, "in no block"),
        ({"partition": (("model.layers.0",), ("model.layers.0",))}, "in blocks 0 and 1"),
        ({"partition": (("nope",),)}, "does not have"),
        ({"partition": ((),)}, "is empty"),
        ({"partition": ()}, "partition"),
        ({"order": "sideways"}, "order"),
        ({"steps": 0}, "steps"),
        ({"inactive": "sgd"}, "inactive"),
        ({"frozen": ("lm_head",), "always_active": ("lm_head",)}, "frozen and always"),
        ({"inactive": LowRank(), "compat": "blockoptimizers"}, "compat"),
    ],
)
def test_what_cannot_work_is_refused(options: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        build(make("llama"), Blocks(**options))


def test_lists_with_a_frozen_rest_cover_the_model() -> None:
    net = make("gpt2")
    given = (("transformer.h.0",), ("transformer.h.1", "transformer.h.2"))
    rest = ("transformer.wte", "transformer.wpe", "transformer.ln_f")
    parts = build(net, Blocks(partition=given, frozen=rest))
    assert len(parts.blocks) == 2
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    swapped = build(net, Blocks(partition=given[::-1], frozen=rest))
    assert fingerprint(shapes, parts) != fingerprint(shapes, swapped)
    wider = {n: (*s[:-1], s[-1] + 1) for n, s in shapes.items()}
    assert fingerprint(shapes, parts) != fingerprint(wider, parts)


@pytest.mark.parametrize("inactive", [None, SGD(0.1), SignSGD(1e-3), LowRank(exclude=("lm_head",))])
def test_plans_survive_toml_and_json(inactive: Any) -> None:
    plan = Plan(blocks=Blocks(partition=(("a", "b"), ("c",)), inactive=inactive, frozen=("d",)))
    assert Plan.from_toml(plan.to_toml()) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(plan.blocks) == hash(Plan.from_json(plan.to_json()).blocks)
