"""Weights that are made of other tensors, as quantised ones are: their products stream."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB = 8, 11


class Quantized(Tensor):
    """Whole numbers and a scale for each row, in the manner of torchao."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantized:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scale.dtype, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, weight: Tensor) -> Quantized:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def whole(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Quantized({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: Any, size: Any, stride: Any) -> Quantized:
        return Quantized(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return x @ weight.whole().T + (bias[0] if bias and bias[0] is not None else 0)
        if func is F.embedding:
            return F.embedding(args[0], args[1].codes.to(args[1].scale.dtype)) * F.embedding(
                args[0], args[1].scale
            )
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].codes), func(args[0].scale))
        raise NotImplementedError(f"{func} of a quantised weight")


class Adapted(nn.Module):
    """A frozen quantised product and a low-rank one that learns."""

    def __init__(self, features: int, bias: bool) -> None:
        super().__init__()
        self.base = nn.Linear(D, features, bias=bias)
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, layers: int, bias: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.mix = nn.ModuleList(Adapted(3 * D, bias) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for mix in self.mix:
            q, k, v = mix(x).unsqueeze(1).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def quantized(net: nn.Module, *, table: bool = False) -> nn.Module:
    """The frozen products of ``net`` quantised, and its embeddings if ``table``."""
    for name, module in net.named_modules():
        if name.endswith("base") or (table and isinstance(module, nn.Embedding)):
            weight = Quantized.of(module.weight.data)
            module.weight = nn.Parameter(weight, requires_grad=False)
            if getattr(module, "bias", None) is not None:
                module.bias.requires_grad_(False)
    return net


def step(net: nn.Module, ids: Tensor) -> list[Tensor | None]:
    net.zero_grad()
    loss = net(ids)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


@given(
    layers=st.integers(1, 3), bias=st.booleans(), table=st.booleans(), chunk=st.integers(1, 9),
    lengths=st.lists(st.integers(2, 15), min_size=2, max_size=2),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_products_with_quantised_weights_stream(
    layers: int, bias: bool, table: bool, chunk: int, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    plain = quantized(Net(layers, bias).double(), table=table)
    streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=chunk)))
    for length in lengths:
        ids = torch.randint(VOCAB, (2, length))
        for a, b in zip(step(streamed, ids), step(plain, ids), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    report = fxmem.explain(streamed)
    assert report.captures
    assert not report.barriers
    assert not report.pieces


def test_layers_with_quantised_weights_share_their_programs() -> None:
    streamed = fxmem.transform(quantized(Net(5, False).double()), Plan(stream=Stream(chunk=4)))
    streamed(torch.randint(VOCAB, (2, 13))).backward()
    uses = [r.uses for r in fxmem.explain(streamed).regions if r.kind == "mixing"]
    assert sum(uses) == 5
    assert max(uses) >= 4


@pytest.mark.parametrize("codes", [torch.int8, torch.int16])
def test_a_weight_of_other_parts_is_another_program(codes: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = quantized(Net(2, False).double())
    other = plain.get_submodule("mix.1.base")
    assert isinstance(other.weight, Quantized)
    wide = Quantized(other.weight.codes.to(codes), other.weight.scale)
    other.weight = nn.Parameter(wide, requires_grad=False)
    streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=4)))
    ids = torch.randint(VOCAB, (2, 13))
    for a, b in zip(step(streamed, ids), step(plain, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
