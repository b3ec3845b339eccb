"""Derivatives of the loss by gates on units, at the size of the model that runs.

A gate multiplies the value of a unit where its consumer reads it; 0 equals the model without the
unit (`fxmem.prune.shrink.masked`). One forward and backward give the derivative by every gate, also
by the closed ones: the value times its gradient, summed over tokens. Weights learn nothing, so
their gradients, a third of a training step, are never formed.

Where no module call reads the unit (matrices of experts), the gate multiplies the weight, and its
derivative is ``sum w dL/d(gate w)``. A channel of the residual stream is gated where it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import PlanError, UnsupportedOpError
from fxmem.frontend.inputs import without_cache
from fxmem.prune.shrink.masked import takes_mask
from fxmem.prune.units.units import Group, Path, unit_of

GATE = "fxmem_gate_of_"

_Place = tuple[str, nn.Module, str, int, Path]
"""What a gate multiplies, the module, its weight, the weight's axis and the units' place on it."""


@dataclass
class _Site:
    """One axis that gates stand on.

    Attributes:
        way: what is multiplied: the "input" or "output" of a module call, or the "weight".
        home: the module. leaf: its weight. axis: of the weight.
        owners: group number -> int (length,), the unit of each position; `size` for none.
    """

    way: str
    home: nn.Module
    leaf: str
    axis: int
    length: int
    owners: dict[int, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{GATE}{self.way}"


class Gates:
    """A context in which a model has a gate for every unit of some groups.

    Args:
        model: runs in evaluation mode; outside the context it is as it was.
        groups: of `fxmem.coupling(model)`.
        run: what is called instead of `model`, such as its transformed form.

    Raises:
        UnsupportedOpError: a unit that no gate can be put on.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], run: Any = None) -> None:
        self.model, self.groups, self.run = model, tuple(groups), run or model
        self.sites = _sites(model, self.groups)
        self.undo: list[Any] = []

    def __enter__(self) -> Gates:
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [(m, m.training) for m in self.model.modules()]

        def back() -> None:
            for p, flag in flags:
                p.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode

        self.undo = [back]
        self.model.eval().requires_grad_(False)
        for site in self.sites:
            self._attach(site)
        return self

    def __exit__(self, *_: object) -> None:
        for back in reversed(self.undo):
            back()
        self.undo = []

    def __call__(
        self, batch: Mapping[str, Any], masks: Mapping[str, Tensor] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss and its derivatives by all gates, float64 (size,) per group, on the CPU.

        Args:
            batch: keyword arguments of the model, with labels.
            masks: bool or number (size,) per group, how far each gate is open; None opens all.

        Raises:
            PlanError: the model gives no loss.
        """
        leaves = [self._set(site, masks) for site in self.sites]
        with torch.enable_grad():
            loss = loss_of(self.run(**without_cache(self.model, batch)))
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        total = [torch.zeros(g.size + 1, dtype=torch.float64) for g in self.groups]
        for site, grad in zip(self.sites, found, strict=True):
            if grad is None:
                continue
            if site.kept is not None:
                grad = (grad * site.kept).movedim(site.axis, -1).flatten(0, -2).sum(0)
            for number, owner in site.owners.items():
                total[number].index_add_(0, owner, grad.double().cpu())
        pairs = zip(self.groups, total, strict=True)
        return float(loss.detach()), {group.name: x[: group.size] for group, x in pairs}

    def _attach(self, site: _Site) -> None:
        weight = getattr(site.home, site.leaf)
        if site.way == "weight":
            site.kept = weight.detach()
            weight.requires_grad_(True)
            self.undo.append(lambda: setattr(weight, "data", site.kept))
            return
        # A parameter of the module: what captures the model sees it as one.
        gate = nn.Parameter(weight.new_ones(site.length))
        site.home.register_parameter(site.name, gate)
        self.undo.append(lambda: delattr(site.home, site.name))
        if site.way == "input":
            handle = site.home.register_forward_pre_hook(_gate_input)
        else:
            handle = site.home.register_forward_hook(_gate_output)
        self.undo.append(handle.remove)

    def _set(self, site: _Site, masks: Mapping[str, Tensor] | None) -> Tensor:
        """Open and close the gates of one site; returns the leaf whose gradient tells."""
        weight: Tensor = getattr(site.home, site.leaf)
        value = torch.ones(site.length, dtype=weight.dtype)
        for number, owner in site.owners.items() if masks is not None else ():
            assert masks is not None
            mask = masks[self.groups[number].name].to(weight.dtype)
            value *= torch.cat([mask, mask.new_ones(1)])[owner]
        value = value.to(weight.device)
        if site.way != "weight":
            gate: Tensor = getattr(site.home, site.name)
            gate.detach().copy_(value)
            return gate
        shape = [1] * weight.dim()
        shape[site.axis] = -1
        assert site.kept is not None
        weight.data = site.kept * value.view(shape) if masks is not None else site.kept
        return weight


def _gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * getattr(module, f"{GATE}input"), *args[1:])


def _gate_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    gate: Tensor = getattr(module, f"{GATE}output")
    if not isinstance(out, Tensor) or out.shape[-1] != len(gate):
        raise UnsupportedOpError(
            "the output of a module is not what its weight writes into the residual stream",
            module=type(module).__name__, advice='search the width with estimator="score"',
        )  # fmt: skip
    return out * gate


def _sites(model: nn.Module, groups: tuple[Group, ...]) -> list[_Site]:
    found: dict[tuple[int, str, str, int], _Site] = {}
    for number, group in enumerate(groups):
        places = _written(model, group) if group.kind == "width" else _read(model, group)
        for way, home, leaf, axis, path in places:
            length = getattr(home, leaf).shape[axis]
            at = (id(home), way, leaf, axis) if way == "weight" else (id(home), way, "", 0)
            site = found.setdefault(at, _Site(way, home, leaf, axis, length))
            owner = unit_of(length, path, group.size)
            if number in site.owners and way != "output":  # another part of the same axis
                owner = torch.minimum(owner, site.owners[number])
            site.owners[number] = owner
    return list(found.values())


def _read(model: nn.Module, group: Group) -> Iterator[_Place]:
    """Where the values of heads, channels and experts are read."""
    for name, axis, path in group.consumer:
        module, _, leaf = name.rpartition(".")
        home = model.get_submodule(module)
        routed = bool(getattr(group, "router", ()))
        called = takes_mask(home, leaf, name, getattr(group, "unowned", ())) and not routed
        yield "input" if called else "weight", home, leaf, axis, path


def _written(model: nn.Module, group: Group) -> Iterator[_Place]:
    """Modules whose call writes the residual stream: lookups, and matrices that do not read it."""
    read = {(n, i) for n, i, _ in group.consumer}
    for name, axis, path in group.members:
        weight = model.get_parameter(name)
        homes = [
            (module, leaf) for module in model.modules()
            for leaf, p in module._parameters.items() if p is weight
        ]  # fmt: skip
        if weight.dim() < 2:  # a norm's, or a bias that its module adds before the gate
            continue
        for home, leaf in homes:
            looks_up = isinstance(home, nn.Embedding)
            if looks_up if len(homes) > 1 else (name, axis) not in read:
                yield "output", home, leaf, axis, path


def loss_of(out: Any) -> Tensor:
    """The loss of a model's output.

    Raises:
        PlanError: there is none.
    """
    loss = getattr(out, "loss", out)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise PlanError(
            "the model gives no loss for this batch", advice="give labels in every batch"
        )
    return loss
