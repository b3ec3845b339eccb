"""Roles where a backward starts from some outputs only: what depends on none of them stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import twins
from hypothesis import given, settings
from hypothesis import strategies as st
from role_cases import BETA, case
from torch import nn

from fxmem import Plan
from fxmem.roles.roles import Role

NAMES = [name for name, _ in twins.Net().named_parameters()]
OUTPUTS = ("loss", "aux", "hidden", "pooled")
KINDS = st.sampled_from([Role.ACTIVE, Role.ACTIVE, Role.UPDATE, Role.FROZEN])


@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_gradients_and_updates_are_those_of_the_outputs_in_use(examples: int) -> None:
    drawn = given(
        roles=st.fixed_dictionaries({n: KINDS for n in NAMES}),
        used=st.sets(st.sampled_from(OUTPUTS), min_size=1, max_size=2),
        plan=st.sampled_from([twins.PLAN, Plan()]),
    )
    drawn(settings(max_examples=examples)(_agree))()


def _agree(roles: dict[str, Role], used: set[str], plan: Plan) -> None:
    torch.manual_seed(0)
    net: Any = twins.Net().double()
    made = case(net, {**roles, "norm.bias": Role.ACTIVE}, plan)
    before = copy.deepcopy(dict(net.named_parameters()))
    for model in (made.plain, net):
        outputs = model(twins.ids())
        total = sum((outputs[k] * 0.7 + 0.1).sin().sum() for k in sorted(used))
        if total.requires_grad:
            total.backward()
    made.table.flush()
    _compare(made.plain, net, made.roles, before)


def _compare(
    plain: nn.Module, net: nn.Module, roles: dict[str, Role], before: dict[str, nn.Parameter]
) -> None:
    for name, p in net.named_parameters():
        want = dict(plain.named_parameters())[name].grad
        if roles[name] is Role.ACTIVE:
            twins.same(p.grad, want, name)
        elif roles[name] is Role.UPDATE and want is not None:
            moved = (before[name] - p).detach() / BETA
            assert float((moved - want).abs().max()) < 1e-12 + 1e-10 * float(want.abs().max())
        else:
            assert p.grad is None, name
            assert torch.equal(p, before[name]), name
