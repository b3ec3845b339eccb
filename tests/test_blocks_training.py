"""Block training through the public calls against plain autograd and hand-written updates."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import tiny
import torch
from double import everything_in_double
from torch import nn

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD, Stream
from fxmem.blocks.attach import state_of
from fxmem.errors import BlockStateError, NotTransformedError, PlanError

STREAM = Stream(chunk=8, loss_chunk=5)
BETA = 0.1


def build(
    name: str = "llama", layers: int = 3, lr: float = 0.01, stream: Stream | None = STREAM,
    dtype: torch.dtype = torch.float64, **options: Any,
) -> tuple[nn.Module, BlockAdamW]:  # fmt: skip
    depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
    net = tiny.model(name, **{depth: layers}).to(dtype)
    options = {"steps": 2, **options}
    fxmem.transform(net, Plan(stream=stream, blocks=Blocks(**options)))
    return net, BlockAdamW(net, lr=lr)


def batch(step: int) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(step)
    ids = torch.randint(0, tiny.VOCAB, (2, 23), generator=gen)
    return {"input_ids": ids, "labels": ids}


def backward(net: nn.Module, step: int) -> torch.Tensor:
    loss: torch.Tensor = net(**batch(step)).loss
    loss.backward()
    return loss.detach()


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


@pytest.mark.parametrize("inactive", [None, SGD(BETA), SignSGD(BETA)], ids=["none", "sgd", "sign"])
def test_every_step_is_adamw_and_the_cheap_update(inactive: Any) -> None:
    with everything_in_double():
        net, opt = build(inactive=inactive)
        plain = tiny.model("llama", num_hidden_layers=3).double()
        reference: Any = None
        for step in range(5):
            old, active = weights(net), set(state_of(net).active)
            plain.load_state_dict(net.state_dict())
            plain.zero_grad()
            backward(plain, step)
            grads = {n: p.grad for n, p in plain.named_parameters()}
            if step % 2 == 0:
                copies = {n: nn.Parameter(old[n].clone()) for n in active}
                kinds = [[p for p in copies.values() if (p.ndim > 1) is w] for w in (True, False)]
                reference = torch.optim.AdamW(
                    [
                        {"params": kinds[0], "weight_decay": 0.01},
                        {"params": kinds[1], "weight_decay": 0.0},
                    ],
                    lr=0.01,
                )
            backward(net, step)
            opt.step()
            net.zero_grad()
            for n, p in copies.items():
                p.grad = grads[n]
            reference.step()
            first = min(layer(n) for n in active)
            for n, p in net.named_parameters():
                outer = "embed" not in n and layer(n) < 0
                if n in active:
                    want = copies[n].detach()
                elif inactive and (outer or layer(n) > first):
                    move = grads[n].sign() if isinstance(inactive, SignSGD) else grads[n]
                    want = old[n] - BETA * move
                else:
                    assert torch.equal(p, old[n]), n
                    continue
                torch.testing.assert_close(p.detach(), want, rtol=1e-11, atol=1e-13)


def test_low_rank_terms_learn_and_weights_stay() -> None:
    with everything_in_double():
        net, opt = build(inactive=LowRank(rank=2, ratio=16.0), reach="all", order="ascending")
        state = state_of(net)
        assert {g["name"] for g in opt.param_groups} == {"decay", "no_decay", "up", "down"}
        start, active = weights(net), set(state.active)
        assert not any("embed" in n or "norm" in n for n in state.adapters)
        for step in range(2):
            backward(net, step)
            opt.step()
            net.zero_grad()
        for n, p in net.named_parameters():
            assert torch.equal(p, start[n]) is (n not in active), n
        name = next(n for n in state.adapters if n not in active)
        assert state.adapters[name].up.abs().max() > 0
        moments = opt.state[state.adapters[name].up]
        assert moments["step"] == 2
        inactive = {n for n in state.adapters if n in active}
        assert all(state.adapters[n].up.abs().max() == 0 for n in inactive)
        backward(net, 2)
        opt.step()
        net.zero_grad()
        assert opt.state[state.adapters[name].up]["step"] in (2, 3)
        with torch.enable_grad():
            unmerged = net(**batch(9)).loss.item()
        assert fxmem.merge_low_rank(net) == len(state.adapters)
        with torch.enable_grad():
            assert net(**batch(9)).loss.item() == pytest.approx(unmerged, rel=1e-10)


def run(net: nn.Module, opt: BlockAdamW, steps: range, schedule: Any) -> None:
    for step in steps:
        backward(net, step)
        opt.step()
        schedule.step()
        net.zero_grad()


@pytest.mark.parametrize("inactive", [SGD(0.1), LowRank(rank=2)], ids=["sgd", "low_rank"])
def test_resume_in_the_middle_of_a_visit_is_bitwise(inactive: Any) -> None:
    runs = []
    for cut in (0, 4):
        net, opt = build(dtype=torch.bfloat16, inactive=inactive, steps=3, reach="all")
        schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)
        run(net, opt, range(cut), schedule)
        if cut:
            file = io.BytesIO()
            torch.save([net.state_dict(), opt.state_dict(), schedule.state_dict()], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            net, opt = build(dtype=torch.bfloat16, inactive=inactive, steps=3, reach="all")
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)
            net.load_state_dict(saved[0])
            opt.load_state_dict(saved[1])
            schedule.load_state_dict(saved[2])
            masters = [s["master"] for s in opt.state.values() if "master" in s]
            assert masters
            assert all(m.dtype is torch.float32 for m in masters)
        run(net, opt, range(cut, 7), schedule)
        terms = [v for a in state_of(net).adapters.values() for v in (a.up, a.down)]
        runs.append([*net.parameters(), *terms])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_scheduler_reaches_inactive_updates() -> None:
    with everything_in_double():
        net, opt = build(inactive=SGD(BETA), reach="all")
        torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0)
        before = weights(net)
        backward(net, 0)
        opt.step()
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_second_forward_in_a_step_needs_a_policy() -> None:
    with everything_in_double():
        net, opt = build(inactive=SGD(BETA), layers=2)
        backward(net, 0)
        moved = weights(net)
        with pytest.raises(BlockStateError, match="second forward"):
            net(**batch(1))
        assert all(torch.equal(p, moved[n]) for n, p in net.named_parameters())
        opt.step()
        net.zero_grad()
        backward(net, 1)


@pytest.mark.parametrize("policy", ["accumulate", "last", "micro"])
def test_accumulation(policy: Any) -> None:
    with everything_in_double():
        net, opt = build(inactive=SGD(BETA), reach="all", layers=2, accumulation=policy)
        state, old = state_of(net), weights(net)
        active = state.active
        plain = tiny.model("llama", num_hidden_layers=2).double()
        want = copy.deepcopy(old)
        for micro in range(2):
            state.is_last_micro_batch = lambda last=micro == 1: last
            plain.load_state_dict(want if policy == "micro" else old)
            plain.zero_grad()
            (plain(**batch(micro)).loss / 2).backward()
            for n, p in plain.named_parameters():
                assert p.grad is not None
                factor = {"last": 2.0 * micro}.get(policy, 1.0)
                if n not in active:
                    want[n] -= BETA * factor * p.grad
            (net(**batch(micro)).loss / 2).backward()
        opt.step()
        for n, p in net.named_parameters():
            if n not in active:
                torch.testing.assert_close(p.detach(), want[n], rtol=1e-10, atol=1e-12)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    with everything_in_double():
        net, opt = build(inactive=SGD(BETA), reach="all", layers=2)
        before = weights(net)
        (net(**batch(0)).loss * float("nan")).backward()
        opt.step()
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
        assert state_of(net).step == 1
        net.zero_grad()
        backward(net, 1)
        opt.step()
        assert not all(torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("clip", ["value", "per_tensor"])
def test_clipping_bounds_inactive_updates(clip: Any) -> None:
    with everything_in_double():
        net, opt = build(inactive=SGD(1.0), reach="all", layers=2, clip=clip, clip_norm=1e-3)
        before, active = weights(net), state_of(net).active
        (net(**batch(0)).loss * 1000).backward()
        moves = [before[n] - p.detach() for n, p in net.named_parameters() if n not in active]
        if clip == "value":
            assert max(m.abs().max().item() for m in moves) == pytest.approx(1e-3)
        else:
            assert sum(m.square().sum() for m in moves).sqrt().item() == pytest.approx(1e-3)


def test_what_is_refused() -> None:
    net, opt = build(inactive=SGD(BETA), dtype=torch.float32)
    other, changed = build(inactive=SGD(BETA), dtype=torch.float32, steps=4)
    with pytest.raises(BlockStateError, match="schedule: saved"):
        opt.load_state_dict(changed.state_dict())
    quieter = build(inactive=SGD(BETA / 2), dtype=torch.float32)[1]
    quieter.load_state_dict(opt.state_dict())
    with pytest.raises(BlockStateError, match="closure"):
        opt.step(lambda: 0.0)
    with pytest.raises(NotTransformedError):
        BlockAdamW(tiny.model())
    with pytest.raises(PlanError, match="start"):
        build(order="fixed", start=9)
    fxmem.restore(other)
    with pytest.raises(NotTransformedError):
        BlockAdamW(other)
