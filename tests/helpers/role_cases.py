"""Models with roles beside plain autograd: shared by the tests of roles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import tiny
import torch
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream, api
from fxmem.compiler.step import CompiledGraph
from fxmem.roles.roles import Adapter, Role, RoleTable

BETA = 3.0
"""Large, so that an update moves weights by as much as they are and a wrong order shows."""
STREAMED = Plan(stream=Stream(chunk=8, loss_chunk=5))
WHOLE = Plan()


@dataclass
class Case:
    """``net`` is transformed and follows ``table``; ``plain`` has the same weights."""

    plain: nn.Module
    net: nn.Module
    roles: dict[str, Role]
    table: RoleTable
    updated: list[nn.Parameter] = field(default_factory=list)

    @property
    def graph(self) -> CompiledGraph:
        return api._TRANSFORMED[self.net].graphs[-1]

    def switch(self, roles: Mapping[str, Role]) -> None:
        """Other roles from the next forward on."""
        self.roles = dict(roles)
        self.table._roles = {p: roles[n] for n, p in self.net.named_parameters()}
        self.updated.clear()

    def variants(self) -> list[str]:
        return [s.name for s in self.graph.selected]


def layer_of(name: str) -> int | None:
    """Number of the decoder layer that a parameter belongs to."""
    found = [int(part) for part in name.split(".") if part.isdigit()]
    return found[0] if found else None


def deeper(net: nn.Module, active: int, other: Role = Role.UPDATE) -> dict[str, Role]:
    """``active`` learns, deeper layers, final norm and untied head have role ``other``."""
    tied = {id(p) for p in net.get_input_embeddings().parameters()}  # type: ignore[operator]
    before = {id(p) for n, p in net.named_parameters() if "embed" in n or "wpe" in n or "wte" in n}
    roles = {}
    for name, p in net.named_parameters():
        layer = layer_of(name)
        if layer is None:
            roles[name] = Role.FROZEN if id(p) in tied | before else other
        else:
            deep = other if layer > active else Role.FROZEN
            roles[name] = Role.ACTIVE if layer == active else deep
    return roles


def everywhere(net: nn.Module, active: int, other: Role = Role.UPDATE) -> dict[str, Role]:
    return {n: Role.ACTIVE if layer_of(n) == active else other for n, _ in net.named_parameters()}


def case(
    net: nn.Module, roles: Mapping[str, Role], plan: Plan,
    adapters: Callable[[nn.Module], dict[nn.Parameter, Adapter]] | None = None,
) -> Case:  # fmt: skip
    plain, updated = copy.deepcopy(net), []

    def update(parameter: nn.Parameter, grad: Tensor) -> None:
        updated.append(parameter)
        parameter.sub_(BETA * grad)

    named = {p: roles[n] for n, p in net.named_parameters()}
    table = RoleTable(named, update, adapters(net) if adapters is not None else None)
    fxmem.transform(net, plan)
    api.use_roles(net, lambda: table, adapters=table.adapters_of_all if adapters else None)
    return Case(plain, net, dict(roles), table, updated)


def compare(made: Case, want: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """Largest relative error of gradients and updates; frozen parameters must be untouched."""
    worst = 0.0
    scale = max(g.abs().max().item() for g in want.values())
    for name, p in made.net.named_parameters():
        role = made.roles[name]
        if role is Role.ACTIVE:
            assert torch.equal(p, before[name])
            got = torch.zeros_like(p) if p.grad is None else p.grad
        else:
            assert p.grad is None, name
            got = (before[name] - p.detach()) / BETA
        if role in (Role.FROZEN, Role.LOW_RANK):
            assert torch.equal(p, before[name]), name
        else:
            ref = want.get(name, torch.zeros_like(p))
            # a weight of size 1 carries the update with 1e-16 of itself
            floor = max(ref.abs().max().item(), 1e-5 * scale)
            worst = max(worst, (got - ref).abs().max().item() / floor)
    return worst


def step(made: Case, inputs: dict[str, Tensor]) -> float:
    """One backward of both models from zero gradients; the error of the transformed one."""
    before = {n: p.detach().clone() for n, p in made.net.named_parameters()}
    made.plain.load_state_dict(made.net.state_dict())
    _, want = tiny.step(made.plain, inputs)
    made.net.zero_grad()
    made.net(**inputs).loss.backward()
    return compare(made, want, before)
