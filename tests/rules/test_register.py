"""A row that does not fit its op is refused when it is registered, or named where it is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from table_samples import Sample, f
from torch import Tensor, nn

import fxmem
from fxmem import Plan, PlanError, Stream, rules
from fxmem.axes import AxisRule, einsum
from fxmem.rules.quantized import packed_product


@torch.library.custom_op("fxmem_tests::unit", mutates_args=())
def unit(x: Tensor, scale: Tensor | None = None) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


unit.register_fake(lambda x, scale=None: torch.empty_like(x))
OP = torch.ops.fxmem_tests.unit.default


@pytest.fixture(autouse=True)
def without_rows() -> Iterator[None]:
    yield
    rules.TABLE.pop(str(OP), None)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("b d, d, d -> b d", "3 operands, the op takes 1 to 2 tensors"),
        ("-> b d, b d", "2 results, the op 1"), ("b d b d", "no ->"),
        ("b ... d -> b d", "stands behind a letter"), ("b d -> ... d", "not in the first operand"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_fit(spec: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        rules.register(OP, AxisRule(einsum(spec)))
    with pytest.raises(PlanError, match="names no e"):
        einsum("b d -> b d", whole="e")


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)])
def test_dots_stand_for_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    rules.register(OP, AxisRule(einsum("... d -> ... d", whole="d")))
    signature = Sample(str(OP), (f(*shape),)).signature
    lead = tuple((f"lead{i}",) for i in range(len(shape) - 1))
    assert signature.ins == signature.outs == ((*lead, ("d",)),)
    assert signature.whole == {"d"}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("t d -> t d", "operand 1 has 3 dimensions, in its row 2"),
     ("... d, d -> ... d", "its row has 2 operands, the call 1"), ("... d -> ... d", None)],
)  # fmt: skip
def test_what_does_not_fit_at_a_call_is_named(spec: str, reason: str | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return (unit(self.table(ids).detach()) * self.table(ids)).square().sum()

    rules.register(OP, AxisRule(einsum(spec, whole="d")))
    net = Model()
    fxmem.transform(net, Plan(stream=Stream(chunk=4, loss_chunk=4)))
    with pytest.warns(fxmem.FxmemWarning) if reason else torch.no_grad(), torch.enable_grad():
        net(torch.randint(11, (2, 9))).backward()
    assert [b.reason for b in fxmem.explain(net).barriers] == ([reason] if reason else [])


def unpacked(codes: Tensor, scale: Tensor) -> Tensor:
    """Two codes of four bits in each byte -> ``[N, K]``."""
    pairs = torch.stack([codes >> 4, codes & 15], -1).flatten(-2)
    return (pairs.to(scale.dtype) - 8) * scale.unsqueeze(1)


@torch.library.custom_op("fxmem_tests::packed", mutates_args=())
def packed(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ unpacked(codes, scale).T + (0 if bias is None else bias)


packed.register_fake(lambda x, codes, scale, bias=None: x.new_empty(*x.shape[:-1], len(scale)))
packed.register_autograd(
    lambda ctx, g: (g @ unpacked(*ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:3]),
)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(6, 1)
        self.register_buffer("codes", torch.randint(255, (6, 2), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(6).double())

    def forward(self, ids: Tensor) -> Tensor:
        bias = self.scale if len(ids) > 1 else None
        x = torch.ops.fxmem_tests.packed(self.embed(ids), self.codes, self.scale, bias)
        return self.head(x).tanh().sum()  # type: ignore[no-any-return]


def test_a_product_with_a_packed_weight_streams_by_its_row() -> None:
    name = "fxmem_tests.packed.default"
    torch.manual_seed(0)
    plain = Packed().double()
    streamed = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=3)))
    rules.register(name, AxisRule(packed_product))
    try:
        for rows in (2, 1):
            ids = torch.randint(11, (rows, 13))
            for net in (streamed, plain):
                net.zero_grad()
                net(ids).backward()
            for p, q in zip(streamed.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
        assert not fxmem.explain(streamed).barriers
    finally:
        rules.TABLE.pop(name)
