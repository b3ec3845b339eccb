"""Adapters on quantised bases: bitsandbytes and torchao (``pip install -e '.[quantized]'``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.field,
]
VOCAB, TOKENS = 8192, 1024


def replaced(net: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """``net`` with other modules in the place of its products, but for the head."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, make(module))
    return net


def four_bits(net: nn.Module) -> nn.Module:
    bnb: Any = pytest.importorskip("bitsandbytes")

    def make(old: nn.Linear) -> Any:
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=torch.float32,
            quant_type="nf4",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(
            old.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        return new.to("cpu")

    return replaced(net, make)


def eight_bits(net: nn.Module) -> nn.Module:
    bnb: Any = pytest.importorskip("bitsandbytes")

    def make(old: nn.Linear) -> Any:
        new = bnb.nn.Linear8bitLt(
            old.in_features, old.out_features, bias=False, has_fp16_weights=False
        )
        new.weight = bnb.nn.Int8Params(
            old.weight.data.clone(), requires_grad=False, has_fp16_weights=False
        )
        return new.to("cpu")

    return replaced(net, make)


def torchao(net: nn.Module) -> nn.Module:
    ao: Any = pytest.importorskip("torchao.quantization")
    ao.quantize_(net.get_submodule("model"), ao.Int8WeightOnlyConfig())
    return net


def plain(net: nn.Module) -> nn.Module:
    return net


BASES = {"nf4": four_bits, "int8": eight_bits, "torchao": torchao}


def adapted(base: Callable[[nn.Module], nn.Module], **config: Any) -> nn.Module:
    torch.manual_seed(0)
    net = base(tiny.model(**config).requires_grad_(False))
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(net, lora).train()


def step(net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    net.zero_grad()
    net(**batch).loss.backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", BASES)
def test_a_quantised_base_streams_exactly(kind: str) -> None:
    want_of, got_of = adapted(BASES[kind]), adapted(BASES[kind])
    fxmem.transform(got_of, Plan(stream=Stream(chunk=8)))
    for length in (23, 32):
        batch = tiny.batch(2, length)
        want, got = step(want_of, batch), step(got_of, batch)
        assert want.keys() == got.keys()
        assert all("lora" in n for n in got)
        for n, a in want.items():
            # float32, in which these libraries compute
            assert float((got[n] - a).norm() / a.norm()) < 2e-6, n
    report = fxmem.explain(got_of)
    assert report.captures == 1
    assert not report.barriers
    assert bool(report.pieces) == (kind == "int8")  # its product with rows of int8 is no plain op


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_the_peak_is_that_of_adapters_on_a_plain_base(kind: str) -> None:
    peaks = {}
    for name, base in (("plain", plain), (kind, BASES[kind])):
        net = adapted(base, num_hidden_layers=2, vocab_size=VOCAB, hidden_size=64)
        fxmem.transform(net)
        batch = tiny.batch(1, TOKENS)
        step(net, batch)
        net.zero_grad()
        peaks[name] = fxmem.measure.peak_bytes(lambda net=net, b=batch: step(net, b))
    assert peaks[kind] <= 1.3 * peaks["plain"]
