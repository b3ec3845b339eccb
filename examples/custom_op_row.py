"""Teach fxmem an op it has never seen: one row of the axis table.

Run: ``python examples/custom_op_row.py``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem
from fxmem import rules
from fxmem.axes import AxisRule, einsum

WIDTH, VOCABULARY = 64, 512


@torch.library.custom_op("example::unit", mutates_args=())
def unit(x_BTD: Tensor) -> Tensor:
    """Every token's vector scaled to length 1, as a kernel of your own might do."""
    return x_BTD / x_BTD.norm(dim=-1, keepdim=True)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_BTD: Tensor) -> Tensor:
    (x_BTD,) = ctx.saved_tensors
    length_BT1 = x_BTD.norm(dim=-1, keepdim=True)
    unit_BTD = x_BTD / length_BT1
    return (grad_BTD - unit_BTD * (grad_BTD * unit_BTD).sum(-1, keepdim=True)) / length_BT1


unit.register_fake(torch.empty_like)
unit.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Model(nn.Module):
    """Scores of the next token, with the op between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.head = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits_BTV = self.head(unit(self.up(self.embed(ids_BT)).relu() + 0.1))
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def streamed_step(ids_BT: Tensor) -> tuple[list[str], Tensor]:
    """Ops that ran whole, and the gradient of the first layer."""
    torch.manual_seed(0)
    model = Model().double()
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=32, loss_chunk=32)))
    model(ids_BT).backward()
    return [barrier.op for barrier in fxmem.explain(model).barriers], model.up.weight.grad


def main() -> None:
    ids_BT = torch.randint(VOCABULARY, (2, 200))
    before, exact = streamed_step(ids_BT)
    print("ops that run whole, without a row:", before)
    assert "example.unit.default" in before

    # Tokens are independent (b and t may be cut); a token's vector is needed complete.
    row = AxisRule(einsum("b t d -> b t d", whole="d"))
    rules.register(torch.ops.example.unit.default, row)
    after, streamed = streamed_step(ids_BT)
    print("ops that run whole, with its row: ", after)
    assert not after
    print(f"largest gradient difference: {(exact - streamed).abs().max().item():.1e}")
    torch.testing.assert_close(streamed, exact, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    main()
