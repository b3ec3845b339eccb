"""Accumulation, clipping, the guard and precision of updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks_cases import (
    STREAM,
    Tensor,
    gradients,
    ids,
    make,
    position,
    small,
    train,
    weights,
)
from torch import nn

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD
from fxmem.blocks.attach import state_of
from fxmem.blocks.move import PIECE, move
from fxmem.blocks.policies import Guard
from fxmem.errors import BlockStateError
from fxmem.roles.roles import Role

BETA = 0.1


def inactive(net: nn.Module, state: Any) -> list[str]:
    return [n for n, _ in net.named_parameters() if n not in state.active]


def window(net: nn.Module, state: Any, count: int, pair: bool = False) -> None:
    """``count`` backwards, each of a loss divided by their number; ``pair``: of two forwards."""
    for micro in range(count):
        state.is_last_micro_batch = lambda last=micro == count - 1: last
        loss = net(ids(micro))
        if pair:
            loss = loss + net(ids(10 + micro))
        (loss / count).backward()


@pytest.mark.parametrize(
    ("kind", "pair"), [(SGD(BETA), True), (SignSGD(BETA), False)], ids=["sgd, two forwards", "sign"]
)
@pytest.mark.parametrize("policy", ["accumulate", "last", "micro"])
def test_accumulation(policy: Any, kind: Any, pair: bool) -> None:
    """Three backwards per step. ``last`` stands for all of them; ``micro`` applies each at once, a
    sign by a third; the active block takes the sum in any case, at the weights of each backward.
    """
    count = 3
    net, opt, state = make(
        inactive=kind, reach="all", accumulation=policy, micro_batches=count, stream=None
    )
    plain, want, sums = small(), weights(net), {}
    names = inactive(net, state)
    for micro in range(count):
        losses = [(1 / count, ids(micro)), *([(1 / count, ids(10 + micro))] if pair else [])]
        grads = gradients(plain, want, *losses)
        for n, g in grads.items():
            if policy == "last" and n in names:
                sums[n] = count * g
            else:
                sums[n] = sums.get(n, 0) + g
        if policy == "micro":
            for n in names:
                move = grads[n].sign() / count if isinstance(kind, SignSGD) else grads[n]
                want[n] = want[n] - BETA * move
    window(net, state, count, pair)
    for n in state.active:
        torch.testing.assert_close(
            dict(net.named_parameters())[n].grad, sums[n], rtol=1e-11, atol=1e-13
        )
    opt.step()
    assert state.step == 1
    moved = weights(net)
    for n in names:
        if policy != "micro":
            want[n] -= BETA * (sums[n].sign() if isinstance(kind, SignSGD) else sums[n])
        torch.testing.assert_close(moved[n], want[n], rtol=1e-11, atol=1e-13, msg=n)


def test_micro_differs_from_the_exact_sum_by_the_square_of_the_rate() -> None:
    ends: dict[str, list[Tensor]] = {}
    for policy in ("accumulate", "micro"):
        net, opt, state = make(
            inactive=SGD(0.01), reach="all", accumulation=policy, order="fixed", stream=None
        )
        start, names = weights(net), inactive(net, state)
        for part in (1.0, 0.5, 0.25):
            net.load_state_dict(start)
            for group in opt.param_groups:
                group["lr"] = part * 0.01  # the rate of updates follows it
            window(net, state, 4)
            opt.step()
            net.zero_grad()
            moved = weights(net)
            ends.setdefault(policy, []).append(torch.cat([moved[n].flatten() for n in names]))
    errors = [
        (a - b).norm().item() / part**2
        for a, b, part in zip(*ends.values(), (1.0, 0.5, 0.25), strict=True)
    ]
    assert max(errors) < 1.1 * min(errors)
    assert min(errors) > 1e-9


def test_a_step_counts_once_whatever_its_backwards() -> None:
    net, opt, state = make(inactive=SGD(BETA), accumulation="accumulate", steps=3, layers=2)
    active = []
    for count in (4, 4, 1, 4):  # a short window is a step as well
        active.append(state.active)
        window(net, state, count)
        opt.step()
        net.zero_grad()
    assert active[0] == active[1] == active[2] != active[3]


def test_last_needs_to_know_the_last() -> None:
    net, opt, state = make(inactive=SGD(BETA), accumulation="last", reach="all")
    before = weights(net)
    state.is_last_micro_batch = lambda: False
    net(ids(0)).backward()
    with pytest.raises(BlockStateError, match="to be the last"):
        opt.step()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert state.step == 0


def test_reading_the_schedule_asks_for_no_update() -> None:
    net, opt, state = make(
        inactive=SGD(BETA), accumulation="last", order="descending", update_head=False
    )
    state.is_last_micro_batch = lambda: False
    assert fxmem.explain(net).blocks is not None
    state.is_last_micro_batch = lambda: True
    net(ids(0)).backward()
    opt.step()  # nothing is deeper than the first block, so nothing was due
    assert state.step == 1


def test_accelerate_says_which_backward_is_the_last() -> None:
    from accelerate.state import GradientState

    flag = GradientState()
    net, opt, state = make(inactive=SGD(BETA), accumulation="last", reach="all", stream=None)
    plain, before = small(), weights(net)
    try:
        for micro in range(2):
            flag._set_sync_gradients(micro == 1)
            (net(ids(micro)) / 2).backward()
    finally:
        flag._set_sync_gradients(True)
    grads = gradients(plain, before, (0.5, ids(1)))
    for n in inactive(net, state):
        got = dict(net.named_parameters())[n].detach()
        torch.testing.assert_close(got, before[n] - 2 * BETA * grads[n], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["value", "per_tensor", "delayed"])
def test_clipping_of_inactive_updates(kind: Any) -> None:
    limit = 1e-2
    net, opt, state = make(inactive=SGD(1.0), reach="all", clip=kind, clip_norm=limit)
    plain = small()
    names = inactive(net, state)
    norm = None
    for step in range(2):  # one visit
        old = weights(net)
        grads = gradients(plain, old, (3.0, ids(step)))
        (3 * net(ids(step))).backward()
        new = weights(net)
        for n in names:
            g = grads[n]
            if kind == "value":
                want = g.clamp(-limit, limit)
            elif kind == "per_tensor":
                want = g * min(1.0, limit / len(names) ** 0.5 / g.norm().item())
            else:
                want = g if norm is None else g * min(1.0, limit / norm)
            torch.testing.assert_close(old[n] - new[n], want, rtol=1e-9, atol=1e-13)
        norm = sum(grads[n].square().sum().item() for n in names) ** 0.5
        assert norm > 10 * limit
        opt.step()
        net.zero_grad()
    if kind == "delayed":
        assert opt.state_dict()["blocks"]["last_norm"] == pytest.approx(norm)


@pytest.mark.parametrize("kind", [None, LowRank(rank=2)], ids=["badam", "low_rank"])
def test_the_norm_of_what_adamw_takes_is_bounded(kind: Any) -> None:
    net, opt, state = make(inactive=kind, reach="all", optimizer={"max_grad_norm": 1.0})
    (1000 * net(ids(0))).backward()
    terms = [t for a in state.adapters.values() for t in (a.up, a.down)]
    grads = [p.grad for p in (*net.parameters(), *terms) if p.grad is not None]
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    taken = grads[0].clone()
    opt.step()
    assert opt.grad_norm is not None and norm > 10
    torch.testing.assert_close(opt.grad_norm, norm)
    first = next(p for p in net.parameters() if p in opt.state)
    torch.testing.assert_close(opt.state[first]["m"], 0.1 * taken / norm, rtol=1e-5, atol=0)


class Chain(nn.Module):
    """Matrices of which one is so scaled that its input's gradient overflows in float32, but no
    activation does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
        torch.manual_seed(0)
        for layer in self.layers:
            layer.weight.data = torch.randn(4, 4)
        self.layers[1].weight.data *= 1e-30
        self.layers[2].weight.data[0] *= 1e30

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("wait", [False, True], ids=["read at once", "select on the device"])
@pytest.mark.parametrize("kind", [SGD(1e18), SignSGD(1e-3)], ids=["sgd", "sign"])
def test_a_gradient_that_is_not_finite_stops_what_comes_after_it(
    kind: Any, wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 3 and 2 have moved before the gradient of layer 1 overflows; 1 and 0 stay."""
    if wait:
        monkeypatch.setattr(Guard, "_readable", lambda self, device: False)
    net = Chain()
    blocks = Blocks(order="fixed", start=0, inactive=kind, reach="all")
    fxmem.transform(net, Plan(blocks=blocks))
    opt, before = BlockAdamW(net, lr=0.1), weights(net)
    x = torch.randn(1, 6, 4)
    (net(x).sum() * 1e10).backward()
    opt.step()
    moved = {position(n) for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {3, 2}
    assert state_of(net).step == 1 and not opt.state
    net.zero_grad()
    net.load_state_dict(before)
    (net(x).sum() * 1e-30).backward()
    opt.step()
    assert not torch.equal(net.layers[0].weight, before["layers.0.weight"])


@pytest.mark.parametrize("stream", [STREAM, None], ids=["streamed", "whole"])
def test_a_loss_that_is_not_finite_moves_nothing(stream: Any) -> None:
    for kind in (SGD(BETA), SignSGD(BETA), LowRank(rank=2)):
        net, opt, state = make(inactive=kind, reach="all", stream=stream)
        before = weights(net)
        terms = [a.down.detach().clone() for a in state.adapters.values()]
        (net(ids(0)) * float("nan")).backward()
        opt.step()
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
        assert all(torch.equal(a.down, t)
                   for a, t in zip(state.adapters.values(), terms, strict=True))  # fmt: skip
        assert state.step == 1 and not opt.state


def test_factors_that_may_overflow_are_not_added_at_once() -> None:
    big = torch.full((2, 2), 1e20)
    for bad in (big, big * float("inf"), big * float("nan")):
        assert Guard().factors(bad, big) is None
    assert Guard().factors(big, torch.ones(2, 2)) is not None
    assert Guard().factors(torch.ones(0, 2).t(), torch.ones(0, 2)) is not None


@pytest.mark.parametrize("guard", [True, False])
def test_plain_sgd_goes_straight_into_the_weights(
    guard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _, state = make(inactive=SGD(BETA), reach="all", stream=None, guard=guard)
    formed: list[Any] = []
    update = state.update
    monkeypatch.setattr(state, "update", lambda p, g: (formed.append(p), update(p, g)))
    net(ids(0)).backward()
    assert formed and len(state._moved) == len(inactive(net, state))
    inner = [p for p in formed if p.ndim == 2 and position(state.names[p]) in (1, 2)]
    assert not inner


@pytest.mark.parametrize("stream", [STREAM, None], ids=["streamed", "whole"])
def test_bfloat16_updates_are_formed_in_float32(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of bfloat16 weights come in the precision of their sums and are not rounded before
    the weight is; the seed decides how it is rounded.
    """
    runs = []
    for seed in (0, 0, 1):
        net, opt, state = make(
            inactive=SGD(BETA), reach="all", stream=stream, dtype=torch.bfloat16, seed=seed,
            order="fixed",
        )  # fmt: skip
        seen: dict[str, Tensor] = {}
        update = state.update

        def spy(p: Any, g: Tensor, seen: Any = seen, state: Any = state, to: Any = update) -> None:
            seen[state.names[p]] = g.clone()
            to(p, g)

        monkeypatch.setattr(state, "update", spy)
        train(net, opt, [0])
        runs.append(weights(net))
    assert set(seen) == set(inactive(net, state))
    assert {g.dtype for g in seen.values()} == {torch.float32}
    matrices = [g for g in seen.values() if g.ndim == 2]
    assert not any(torch.equal(g, g.bfloat16().float()) for g in matrices)
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    assert any(not torch.equal(runs[0][n], runs[2][n]) for n in runs[0])


def test_a_move_in_pieces_is_the_move() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(3 * PIECE // 100, 128), torch.randn(128, 3 * PIECE // 100).t()
    moved = weight.clone()
    move(moved, grad, 0.5, 2.0, limit=0.7)
    torch.testing.assert_close(moved, weight - 0.5 * (2 * grad).clamp(-0.7, 0.7))
    narrow, whole = weight.bfloat16(), weight.bfloat16()
    move(narrow, grad, 1e-3, 1.0, bits=5)
    move(whole[:40], grad[:40], 1e-3, 1.0, bits=5)
    assert torch.equal(narrow[:40], whole[:40])
    scalar = torch.tensor(1.0)
    move(scalar, torch.tensor(2.0), 0.5, 1.0, sign=True)
    assert scalar.item() == 0.5


def test_a_parameter_without_gradient_is_tolerated() -> None:
    net = small(dtype=torch.float32)
    net.layers[0].spare = nn.Linear(3, 3)
    fxmem.transform(net, Plan(blocks=Blocks(order="fixed", inactive=SGD(BETA), reach="all")))
    opt = BlockAdamW(net)
    train(net, opt, [0])
    assert net.layers[0].spare.weight not in opt.state
    assert state_of(net).role(net.layers[0].spare.weight) is Role.ACTIVE


def test_evaluation_with_gradients_updates_nothing() -> None:
    net, _, state = make(inactive=SGD(BETA), reach="all")
    before = weights(net)
    net.eval()
    net(ids(0)).backward()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert {n for n, p in net.named_parameters() if p.grad is not None} == state.active


def test_gradients_and_state_are_those_of_the_active_block() -> None:
    net, opt, state = make(dtype=torch.bfloat16, inactive=SGD(BETA), reach="all", steps=2)
    for step in range(5):
        active = state.active
        net(ids(step)).backward()
        assert {n for n, p in net.named_parameters() if p.grad is not None} == active
        opt.step()
        net.zero_grad()
        numel = sum(p.numel() for n, p in net.named_parameters() if n in active)
        held = sum(v.numel() * v.itemsize for e in opt.state.values()
                   for v in e.values() if isinstance(v, Tensor))  # fmt: skip
        assert held == (12 * numel if step % 2 == 0 else 0)
