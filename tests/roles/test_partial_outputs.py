"""Roles where a backward starts from some outputs only: what depends on none of them stays."""

from __future__ import annotations

import copy
from typing import Any

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
ROLES = st.fixed_dictionaries(
    {n: st.sampled_from([Role.ACTIVE, Role.UPDATE, Role.FROZEN]) for n in NAMES}
)


@settings(max_examples=10)
@given(
    roles=ROLES,
    used=st.lists(st.sets(st.sampled_from(OUTPUTS), min_size=1), min_size=1, max_size=2),
    plan=st.sampled_from([twins.PLAN, Plan()]),
)
def test_gradients_and_updates_are_those_of_the_outputs_in_use(
    roles: dict[str, Role], used: list[set[str]], plan: Plan
) -> None:
    torch.manual_seed(0)
    net: Any = twins.Net().double()
    if not any(r is not Role.FROZEN for r in roles.values()):
        roles = {**roles, NAMES[0]: Role.ACTIVE}
    made = case(net, roles, plan)
    for names in used:
        before = copy.deepcopy(dict(net.named_parameters()))
        made.plain.load_state_dict(net.state_dict())
        for model in (made.plain, net):
            model.zero_grad()
            outputs = model(twins.ids())
            total = sum(outputs[k].square().sum() for k in sorted(names))
            if total.requires_grad:
                total.backward()
        made.table.flush()
        _compare(made.plain, net, roles, before)


def _compare(
    plain: nn.Module, net: nn.Module, roles: dict[str, Role], before: dict[str, nn.Parameter]
) -> None:
    want = {n: p.grad for n, p in plain.named_parameters()}
    for name, p in net.named_parameters():
        if roles[name] is Role.ACTIVE:
            twins.same(p.grad, want[name], name)
        elif roles[name] is Role.UPDATE and want[name] is not None:
            moved = (before[name] - p).detach() / BETA
            scale = max(1.0, float(want[name].abs().max()))  # type: ignore[union-attr]
            assert float((moved - want[name]).abs().max()) < 1e-9 * scale, name
        else:
            assert p.grad is None, name
            assert torch.equal(p, before[name]), name
