"""What block training refuses, and that weights and state are then as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks_cases import STREAM, Small, Tensor, ids, make, position, small, train, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD, Stream
from fxmem.blocks.attach import state_of
from fxmem.errors import (
    BackwardTwiceError,
    BlockStateError,
    ModifiedParameterError,
    NotTransformedError,
    PlanError,
)

BETA = 0.1


def _unchanged(net: Small, opt: BlockAdamW, before: Any) -> None:
    values, saved = before
    assert all(torch.equal(p, values[n]) for n, p in net.named_parameters())
    assert state_of(net).step == saved["blocks"]["global_step"]
    now = opt.state_dict()
    assert now["state"].keys() == saved["state"].keys()
    for n, entry in now["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(saved["state"][n][k]))
                   for k, v in entry.items())  # fmt: skip


def _copy(net: Small, opt: BlockAdamW) -> Any:
    saved = opt.state_dict()
    saved["state"] = {n: {k: v.clone() if isinstance(v, Tensor) else v for k, v in e.items()}
                      for n, e in saved["state"].items()}  # fmt: skip
    return weights(net), saved


@pytest.mark.parametrize(
    "kind", [SGD(BETA), LowRank(rank=2), None], ids=["sgd", "low_rank", "none"]
)
def test_what_a_step_refuses_changes_nothing(kind: Any) -> None:
    net, opt, _ = make(inactive=kind, reach="all", steps=4)
    train(net, opt, [0])
    before = _copy(net, opt)
    for name in ("head.weight", "layers.0.up.weight", "layers.2.down.weight"):
        loss = net(ids(1))
        with torch.no_grad():
            dict(net.named_parameters())[name].mul_(1.0)
        if kind is None and position(name) < position(min(state_of(net).active)):
            continue
        with pytest.raises(ModifiedParameterError):
            loss.backward()
        _unchanged(net, opt, before)
    with pytest.raises(BlockStateError, match="closure"):
        opt.step(lambda: 0.0)
    _unchanged(net, opt, before)
    loss = net(ids(1))
    loss.backward(retain_graph=True)
    after = _copy(net, opt)
    if isinstance(kind, SGD):
        with pytest.raises(BackwardTwiceError):
            loss.backward()
        with pytest.raises(BlockStateError, match="second forward"):
            net(ids(2))
    _unchanged(net, opt, after)
    opt.step()


def test_a_resume_with_another_plan_is_refused() -> None:
    net, opt, _ = make(inactive=SGD(BETA))
    train(net, opt, [0])
    before = _copy(net, opt)
    pairs = {
        "partition": {"inactive": SGD(BETA), "layers_per_block": 2},
        "schedule": {"inactive": SGD(BETA), "steps": 7},
        "update": {"inactive": SignSGD(BETA)},
    }
    for what, options in pairs.items():
        other = make(**options)[1]
        with pytest.raises(BlockStateError, match=rf"{what}: saved .*present"):
            opt.load_state_dict(other.state_dict())
        _unchanged(net, opt, before)
    with pytest.raises(BlockStateError, match="not of BlockAdamW"):
        opt.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())
    quieter = make(inactive=SGD(BETA / 2))[1]
    quieter.load_state_dict(opt.state_dict())
    ranks = [make(inactive=LowRank(rank=r))[1] for r in (1, 2)]
    with pytest.raises(BlockStateError, match="saved up"):
        ranks[0].load_state_dict(ranks[1].state_dict())


@pytest.mark.parametrize("kind", [SGD(BETA), SignSGD(BETA)], ids=["sgd", "sign"])
def test_scaled_losses_are_refused_where_updates_would_be_scaled(kind: Any) -> None:
    net, opt, _ = make(inactive=kind, dtype=torch.float32)
    before = weights(net)
    with torch.autocast("cpu", torch.float16), pytest.raises(BlockStateError, match="float16"):
        net(ids(0))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    half = make(inactive=kind, dtype=torch.float16)[0]
    with pytest.raises(BlockStateError, match="float16"):
        half(ids(0))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(ids(0))).backward()
    with pytest.raises(BlockStateError, match="GradScaler"):
        scaler.step(opt)


@pytest.mark.parametrize("kind", [None, LowRank(rank=2)], ids=["badam", "low_rank"])
def test_a_grad_scaler_is_exact_without_updates_in_the_backward(kind: Any) -> None:
    ends = []
    for scaled in (False, True):
        net, opt, state = make(inactive=kind, dtype=torch.float32, reach="all")
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for step in range(3):
            scaler.scale(net(ids(step))).backward()
            scaler.step(opt)
            scaler.update()
            net.zero_grad()
        terms = [t for a in state.adapters.values() for t in (a.up, a.down)]
        ends.append([*net.parameters(), *terms])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_one_optimizer_per_model_and_parameters_of_the_model() -> None:
    net, old, _ = make(inactive=SGD(BETA))
    opt = BlockAdamW(net, lr=0.01)
    with pytest.raises(BlockStateError, match="another optimizer"):
        old.step()
    before = weights(net)
    # as DeepSpeed's ZeRO does
    flat = [torch.cat([p.detach().flatten() for p in g["params"]]) for g in opt.param_groups]
    for group, values in zip(opt.param_groups, flat, strict=True):
        group["params"] = [nn.Parameter(values)]
    with pytest.raises(BlockStateError, match="ZeRO"):
        net(ids(0))
    net, opt, _ = make(inactive=SGD(BETA))
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())  # as sharding does
    with pytest.raises(BlockStateError, match="replaced"):
        net(ids(0))
    fxmem.transform(net, Plan(blocks=Blocks(inactive=SGD(BETA))))
    with pytest.raises(BlockStateError, match="transformed anew"):
        opt.step()
    fxmem.restore(net)
    for wrong in (net, small()):
        with pytest.raises(NotTransformedError):
            BlockAdamW(wrong)
    assert weights(net).keys() == before.keys()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inactive": SignSGD(BETA), "accumulation": "micro"}, "micro_batches"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"accumulation": "sometimes"}, "accumulation"),
        ({"clip": "two_pass"}, "clip"),
        ({"order": "fixed", "start": 9}, "start"),
    ],
)
def test_impossible_policies_are_refused(options: Any, match: str) -> None:
    net = small()
    with pytest.raises(PlanError, match=match):
        fxmem.transform(net, Plan(blocks=Blocks(**options)))
    with pytest.raises(NotTransformedError):
        fxmem.restore(net)


def test_a_step_that_is_none_is_refused() -> None:
    """It would move the schedule on."""
    net, opt, state = make(inactive=SGD(BETA))
    with pytest.raises(BlockStateError, match="blank_state_dict"):
        get_optimizer_state_dict(net, opt)
    assert state.step == 0
    everything = make(inactive=None, partition=[("embed", "layers", "norm", "head")])[1:]
    for p in everything[1].names:
        p.grad = torch.ones_like(p)
    everything[0].step()


def test_data_parallel_wrappers_are_refused() -> None:
    with pytest.raises(PlanError, match="DataParallel"):
        fxmem.transform(nn.DataParallel(small()), Plan(blocks=Blocks()))


@pytest.mark.parametrize("stream", [None, STREAM], ids=["whole", "chunks"])
def test_another_optimizer_is_refused_before_anything_changes(stream: Stream | None) -> None:
    """It would train block 0 for ever."""
    net = small()
    fxmem.transform(net, Plan(stream=stream, blocks=Blocks(inactive=SGD(BETA), reach="all")))
    before = weights(net)
    other = torch.optim.AdamW(net.parameters())
    with pytest.raises(BlockStateError, match="no BlockAdamW"):
        net(ids(0)).backward()
    assert all(torch.equal(w, before[n]) for n, w in weights(net).items())
    opt = BlockAdamW(net)
    net(ids(0)).backward()
    moved = weights(net)
    with pytest.raises(BlockStateError, match=r"AdamW steps a model.*BlockAdamW\(model\)"):
        other.step()
    assert all(torch.equal(w, moved[n]) for n, w in weights(net).items())
    opt.step()
    fxmem.restore(net)
    net(ids(0)).backward()
    other.step()
