"""A row that does not fit its op is refused when it is registered, or named where it is used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from table_samples import Sample, f
from torch import Tensor, nn

import fxmem
from fxmem import Plan, PlanError, Stream, rules
from fxmem.axes import AxisRule, einsum


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
