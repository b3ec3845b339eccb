"""Models of transformers that are no decoders alone: encoders, pairs of both, images, sound, and
tables of positions that depend on the length. All are exact; most have nothing that runs whole.
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

VOCAB = 60
Batch = dict[str, Any]
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
PAIR = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "dropout": 0.0,
}  # fmt: skip
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ids(length: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 50, (rows, length), generator=generator)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(tf.BartConfig(**PAIR, max_position_embeddings=64))


def bert() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=VOCAB, **ENCODER, **CALM))


def vit() -> nn.Module:
    config = tf.ViTConfig(**ENCODER, **CALM, image_size=32, patch_size=4, num_labels=3)
    return tf.ViTForImageClassification(config)


def clip() -> nn.Module:
    words = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = tf.CLIPConfig(
        text_config={**ENCODER, **words, "max_position_embeddings": 64},
        vision_config={**ENCODER, "image_size": 16, "patch_size": 4}, projection_dim=16,
    )  # fmt: skip
    return tf.CLIPModel(config)


def whisper() -> nn.Module:
    config = tf.WhisperConfig(
        **PAIR, num_mel_bins=8, max_source_positions=30, max_target_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def longrope() -> nn.Module:
    """The tables of positions are others beyond 20 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 20,
    }  # fmt: skip
    config = tf.Phi3Config(
        **ENCODER, vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64,
        original_max_position_embeddings=20, rope_parameters=rope, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return tf.Phi3ForCausalLM(config)


def translation(length: int) -> Batch:
    return {"input_ids": ids(length), "labels": ids(length // 2)}


def words(length: int) -> Batch:
    mask = torch.ones_like(ids(length))
    mask[0, -4:] = 0
    return {"input_ids": ids(length), "labels": ids(length), "attention_mask": mask}


def text(length: int) -> Batch:
    return {"input_ids": ids(length), "labels": ids(length)}


def images(length: int) -> Batch:
    return {"pixel_values": noise(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 1])}


def captions(length: int) -> Batch:
    shown = {"pixel_values": noise(4, 3, 16, 16), "return_loss": True}
    return {"input_ids": ids(length, 4), "attention_mask": torch.ones(4, length).long(), **shown}


def speech(length: int) -> Batch:
    return {"input_features": noise(2, 8, 60), "labels": ids(length)}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "bert": (bert, words), "longrope": (longrope, text), "t5": (t5, translation),
    "bart": (bart, translation), "vit": (vit, images), "clip": (clip, captions),
    "whisper": (whisper, speech),
}  # fmt: skip
QUICK = ("bert", "longrope", "vit")
CROSS = {"t5", "bart"}
"""Attention from a length to another one runs whole."""


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_an_architecture(name: str) -> None:
    make, batch = CASES[name]
    torch.manual_seed(0)
    plain = make().double().train()
    streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=8)))
    with everything_in_double(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in (15, 23, 32):
            got, want = [], []
            for net, out in ((streamed, got), (plain, want)):
                net.zero_grad()
                loss = net(**batch(length)).loss
                loss.backward()
                out += [loss.detach(), *(p.grad for p in net.parameters())]
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    report = fxmem.explain(streamed)
    assert report.captures
    assert [p.name for p in report.pieces] == (["model.rotary_emb"] if name == "longrope" else [])
    attends = {b.op.partition("_backward")[0].split(".default")[0] for b in report.barriers}
    assert ("fxmem.attention" in attends) == (name in CROSS)
