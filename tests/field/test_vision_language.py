"""Vision-language models of transformers with images: exact, and the language part streams.

A tower, or a method whose sizes are values, runs whole.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from double import everything_in_double
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
VOCAB, IMAGE, ROWS = 60, 55, 4
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Batch = dict[str, Tensor]


def text(length: int, images: int = 1) -> Batch:
    """Ids with the places of an image in them, and labels without."""
    ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(length))
    ids[:, 2 : 2 + ROWS * images] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=8,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config)


def llava_batch(length: int, images: int) -> Batch:
    return {**text(length), "pixel_values": pixels(2, 3, 16, 16)}


def qwen() -> nn.Module:
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = tf.Qwen2VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, image_token_id=IMAGE,
        video_token_id=56, vision_start_token_id=57, vision_end_token_id=58,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen_batch(length: int, images: int) -> Batch:
    """Images of any size: ``images`` times as wide."""
    batch = text(length, images)
    batch["input_ids"][:, 1], batch["input_ids"][:, 2 + ROWS * images] = 57, 58
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= 50, -100)
    grid = torch.tensor([[1, 4, 4 * images]] * 2)
    return {
        **batch, "pixel_values": pixels(int(grid.prod(-1).sum()), 96), "image_grid_thw": grid,
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).int(),
    }  # fmt: skip


def gemma() -> nn.Module:
    vision = tf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    own = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    config = tf.Gemma3Config(
        vision_config=vision, text_config=tf.Gemma3TextConfig(**TEXT, **own), image_token_id=IMAGE,
        mm_tokens_per_image=ROWS, boi_token_index=57, eoi_token_index=58,
    )  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(config)


def gemma_batch(length: int, images: int) -> Batch:
    batch = text(length)
    kinds = (batch["input_ids"] == IMAGE).long()
    return {**batch, "token_type_ids": kinds, "pixel_values": pixels(2, 3, 16, 16)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch], set[str]]] = {
    "llava": (llava, llava_batch, {"model.vision_tower"}),
    "qwen2-vl": (qwen, qwen_batch, {"model.get_rope_index", "model.get_image_features"}),
    "gemma3": (gemma, gemma_batch, set()),
}


def step(model: nn.Module, batch: dict[str, Any]) -> list[Tensor | None]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(n, marks=pytest.mark.field) for n in ("qwen2-vl", "gemma3"))]
)
def test_a_model_with_images(name: str) -> None:
    make, batch, whole = MODELS[name]
    torch.manual_seed(0)
    plain = make().double().train()
    plain.config.use_cache = plain.config.text_config.use_cache = False
    streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=8)))
    with everything_in_double(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length, images in ((23, 1), (32, 1), (29, 2)):
            given = batch(length, images)
            want, got = step(plain, dict(given)), step(streamed, dict(given))
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    report = fxmem.explain(streamed)
    assert {p.name for p in report.pieces} == whole
    assert [r.kind for r in report.regions].count("mixing") >= 1
