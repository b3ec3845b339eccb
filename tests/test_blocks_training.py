"""Block training with a plain-autograd executor against hand-written updates, in float64."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from fxmem.blocks.attach import attach
from fxmem.blocks.optimizer import BlockAdamW
from fxmem.blocks.order import Schedule
from fxmem.blocks.partition import from_lists, partition
from fxmem.blocks.roles import Role
from fxmem.blocks.state import BlockState
from fxmem.errors import BlockStateError, PlanError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.stack:
            x = x + layer(x).tanh()
        out: torch.Tensor = self.out(x)
        return out


def build(dtype: torch.dtype = torch.float64, steps: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    net = Net().to(dtype)
    blocks = partition(net)
    order = options.pop("order", "random")
    state = BlockState(net, blocks, Schedule(len(blocks), steps, order), **options)
    attach(net, state)
    return net, state, BlockAdamW(net, lr=0.01)


def backward(net: Net, state: BlockState, step: int) -> dict[str, torch.Tensor]:
    """Plain autograd; then inactive gradients, all taken at the old weights, are used up."""
    gen = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=gen, dtype=torch.float64).to(net.out.weight.dtype)
    net(x).square().mean().backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    for p in net.parameters():
        role = state.role(p)
        if role is Role.UPDATE and p.grad is not None:
            state.update(p, p.grad)
        if role is not Role.ACTIVE:
            p.grad = None
    return grads


@pytest.mark.parametrize("inactive", [None, "sgd", "sign"])
@pytest.mark.parametrize("reach", ["deeper", "all"])
def test_every_step_is_the_reference(inactive: Any, reach: Any) -> None:
    net, state, opt = build(inactive=inactive, lr=0.1, reach=reach)
    depth = [n for n, _ in net.named_parameters()]
    reference = None
    for step in range(13):
        old = {n: p.detach().clone() for n, p in net.named_parameters()}
        active = state.active
        if step % 3 == 0:
            copies = {n: nn.Parameter(old[n].clone()) for n in active}
            kinds = [[p for p in copies.values() if (p.ndim > 1) is w] for w in (True, False)]
            reference = torch.optim.AdamW(
                [
                    {"params": kinds[0], "weight_decay": 0.01},
                    {"params": kinds[1], "weight_decay": 0.0},
                ],
                lr=0.01,
            )
        grads = backward(net, state, step)
        opt.step()
        opt.zero_grad()
        for n, p in copies.items():
            p.grad = grads[n]
        assert reference is not None
        reference.step()
        first = min(depth.index(n) for n in active)
        for n, p in net.named_parameters():
            if n in active:
                want = copies[n]
            elif inactive and (reach == "all" or depth.index(n) > first):
                want = old[n] - 0.1 * (grads[n].sign() if inactive == "sign" else grads[n])
            else:
                want = old[n]
            torch.testing.assert_close(p.data, want.data, rtol=1e-12, atol=1e-14)


def test_resume_in_the_middle_of_a_visit_is_bitwise() -> None:
    runs = []
    for cut in (None, 7):
        net, state, opt = build(torch.bfloat16, inactive="sgd", lr=0.1, reach="all")
        for step in range(20):
            if step == cut:
                file = io.BytesIO()
                torch.save([net.state_dict(), opt.state_dict()], file)
                file.seek(0)
                weights, saved = torch.load(file, weights_only=True)
                net, state, opt = build(torch.bfloat16, inactive="sgd", lr=0.1, reach="all")
                net.load_state_dict(weights)
                opt.load_state_dict(saved)
                assert all(s["master"].dtype is torch.float32 for s in opt.state.values())
                assert len(opt.state) == 2
            backward(net, state, step)
            opt.step()
            opt.zero_grad()
        runs.append(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_is_refused() -> None:
    net, state, opt = build(inactive="sgd", lr=0.1, reach="all")
    other = build(steps=4, inactive="sgd", lr=0.1, reach="all")[2]
    with pytest.raises(BlockStateError, match="schedule"):
        opt.load_state_dict(other.state_dict())
    with pytest.raises(BlockStateError, match="closure"):
        opt.step(lambda: 0.0)
    backward(net, state, 0)
    with pytest.raises(BlockStateError, match="second gradient"):
        backward(net, state, 0)
    for lists in ([], [[]], [["nope"]], [["stack.0"], ["stack.0.weight"]]):
        with pytest.raises(PlanError):
            from_lists(net, lists)
