"""The private names of FSDP2, in one process: they do what :mod:`fxmem._compat.fsdp` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fxmem._compat import fsdp


@pytest.fixture
def model(tmp_path: Path) -> Iterator[nn.Module]:
    """Two layers in groups of their own under a root, with a policy of precision."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64)
    for layer in net:
        fully_shard(layer, mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    yield net
    dist.destroy_process_group()


def groups(model: nn.Module) -> list[fsdp.Group]:
    known: dict[object, fsdp.Group] = {}
    return [fsdp.group_of(m, known) for m in model.modules()]


def test_a_group_opens_and_closes(model: nn.Module) -> None:
    assert all(map(fsdp.is_sharded, model.modules()))
    root, first, _ = groups(model)
    root.open()
    before = list(first.whole())
    assert [w.untyped_storage().nbytes() for w, _ in before] == [0, 0]
    first.show()
    assert model[0].weight is before[0][0]
    first.hide()
    assert model[0].weight is not before[0][0]
    first.open()
    assert model[0].weight is before[0][0]  # persistent
    assert before[0][0].untyped_storage().nbytes() > 0
    first.close()
    root.close()


def test_who_has_a_part_and_what_stays_open(model: nn.Module) -> None:
    root, first, _ = groups(model)
    root.open()  # makes the groups' options
    root.close()
    assert root.ranks == first.ranks == 1
    assert root.stays and not first.stays


def test_a_group_stays_whole_until_it_is_let_go(model: nn.Module) -> None:
    root, first, _ = groups(model)
    root.open()
    first.open()
    (whole, _), *_ = first.whole()
    for stay in (True, False):
        first.close(stay=stay)
        first.hide()
        assert (model[0].weight is whole) == stay
        first.open()
    first.close(stay=True)
    root.close()
    assert first.let_go(torch.ones(2)).dtype == torch.float64
    first.hide()
    assert model[0].weight is not whole
    assert not first.stays


def test_who_calls_a_module_that_waits_lets_go_first(model: nn.Module) -> None:
    root, first, _ = groups(model)
    root.open()
    first.open()
    (whole, shard), *_ = first.whole()
    first.close(stay=True)
    root.close()
    first.wait(first.let_go)
    assert model[0].weight is shard and whole.untyped_storage().nbytes() > 0
    assert first.is_open
    model(torch.ones(2, 3))
    assert not first.is_open
    assert not first._waiting
    model.state_dict()
    assert model[0].weight is shard


def test_where_a_group_is(model: nn.Module) -> None:
    root, first, _ = groups(model)
    assert root.place is None  # its parameters are those of the layers
    assert first.place == ([dist.group.WORLD], torch.device("cpu"))


def test_gradients_are_reduced_into_shards(model: nn.Module) -> None:
    root, first, _ = groups(model)
    root.open()
    first.open()
    (weight, _), (bias, shard) = first.whole()
    version = shard._version
    first.close()
    root.close()
    x = torch.zeros((), requires_grad=True)

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            assert not root.in_backward
            root.open_backward()
            first.open_backward()
            first.open_backward()  # once is enough
            assert root.in_backward
            assert weight.untyped_storage().nbytes() > 0
            weight.grad = torch.ones_like(weight)
            first.reduce()
            return grad

    Step.apply(x).backward()
    assert not root.in_backward
    assert weight.grad is None
    assert torch.equal(model[0].weight.grad.full_tensor(), torch.ones(3, 3))
    assert model[0].bias.grad is None
    with torch.no_grad():
        model[0].bias.add_(1)
    assert shard._version > version  # what an optimizer changes


def test_hooks_are_told_from_those_of_others(model: nn.Module) -> None:
    _, first, _ = groups(model)
    handle = model[0].register_forward_pre_hook(lambda *_: None)
    before, keywords, after = fsdp.traced_hooks(model[0], first)
    assert handle.id in before and len(before) == 2  # the cast of the policy, and the user's
    was = fsdp.hooks_of(model[0])
    fsdp.set_hooks(model[0], (before, keywords, after))
    seen = []
    model[0].register_forward_hook(lambda m, args, out: seen.append(args[0].dtype))
    model[0].weight, model[0].bias = (
        nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in ((3, 3), (3,))
    )
    assert model[0](torch.zeros(2, 3)).dtype == torch.float64
    assert seen == [torch.bfloat16]
    fsdp.set_hooks(model[0], was)
