"""What each region ran, saved and learned in a step with roles, as data and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from fxmem.axes.sizes import evaluate_shape
from fxmem.frontend.capture import canonical_shape
from fxmem.frontend.parameter_free import Leaf
from fxmem.report.block_epoch import Region
from fxmem.roles.roles import Role
from fxmem.roles.updates import consumed
from fxmem.roles.variants import Selection
from fxmem.runtime.region_code import RegionCode


@dataclass(frozen=True, slots=True)
class GradientReport:
    """One gradient that the region makes.

    Attributes:
        parameter: name of the parameter; of an adapter, the weight's with ``.up`` or ``.down``.
        goes: ``returned`` (to autograd), ``consumed`` (inside the program, one alive at a time),
            ``handed over`` (to the update after the program) or ``reduced`` (over the ranks that
            have shards, which then update them).
        bytes: of the gradient.
    """

    parameter: str
    role: str
    goes: str
    bytes: int


@dataclass(slots=True)
class RegionStep:
    """A region in the latest step.

    Attributes:
        variant: ``idle`` (forward only), ``active`` (no gradient of its input) or ``tail``.
        saved_bytes: states it keeps for its backward; parameters are not counted.
        hands_on: it makes the gradient of its input.
        gradients: of parameters and adapters, in order of the region's inputs.
    """

    modules: str
    variant: str
    saved_bytes: int
    hands_on: bool
    gradients: list[GradientReport] = field(default_factory=list)

    @property
    def live_gradient_bytes(self) -> int:
        """Most bytes of gradients of UPDATE parameters alive at once in this region."""
        held = sum(g.bytes for g in self.gradients if g.goes in ("handed over", "reduced"))
        one = max((g.bytes for g in self.gradients if g.goes == "consumed"), default=0)
        return held + one

    def __str__(self) -> str:
        goes: dict[str, list[int]] = {}
        for g in self.gradients:
            goes.setdefault(f"{g.role} {g.goes}", []).append(g.bytes)
        parts = [f"{len(b)} gradients {k} ({_size(sum(b))})" for k, b in goes.items()]
        if self.hands_on:
            parts.insert(0, "gradient of its input")
        text = ", ".join(parts) or "no backward"
        return f"{self.modules}: {self.variant}, saves {_size(self.saved_bytes)}, {text}"


Called = tuple[str, Sequence[Leaf], int, Mapping[str, int]]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def region_steps(
    calls: Sequence[Called], selected: Sequence[Selection], names: Mapping[nn.Parameter, str]
) -> list[RegionStep]:
    """One report per region of a call.

    Args:
        calls: modules, inputs, rows per chunk and sizes of each region.
        selected: the variants that ran.
        names: of the model's parameters.
    """
    return [
        _step(modules, leaves, chunk, chosen, sizes, names)
        for (modules, leaves, chunk, sizes), chosen in zip(calls, selected, strict=True)
    ]


def _step(
    modules: str, leaves: Sequence[Leaf], chunk: int, chosen: Selection, sizes: Mapping[str, int],
    names: Mapping[nn.Parameter, str],
) -> RegionStep:  # fmt: skip
    code = chosen.code
    out = RegionStep(modules, chosen.name, 0, chosen.hands_on)
    if not chosen.learns:
        return out
    variant = chosen.variant
    out.saved_bytes = _state_bytes(code, leaves, code.saved(code.early, variant), sizes)
    inside = consumed(code, variant) if chunk >= sizes.get("T", 1) else set()
    owners = _owners(chosen, names)
    for i, parameter in chosen.parameters.items():
        if chosen.wanted[i]:
            goes = "returned"
            if i in chosen.reduced:
                goes = "reduced"
            elif i in chosen.updates:
                goes = "consumed" if i in inside else "handed over"
            role = chosen.roles.get(i, Role.LOW_RANK).value
            out.gradients.append(GradientReport(owners[i], role, goes, parameter.nbytes))
    return out


def _state_bytes(
    code: RegionCode, leaves: Sequence[Leaf], kept: Sequence[bool], sizes: Mapping[str, int]
) -> int:
    total = 0
    for value, leaf, keep in zip(code.values, leaves, kept, strict=False):
        if keep and leaf[0] == "main":
            shape = evaluate_shape(canonical_shape(value, code.region.capture.symbols), sizes)
            total += math.prod(shape) * value.dtype.itemsize
    return total


def known_regions(
    calls: Sequence[Called], selected: Sequence[Selection], names: Mapping[nn.Parameter, str]
) -> list[Region]:
    """What a block-epoch needs to know of each region; arguments as for `region_steps`."""
    return [
        Region(
            frozenset(names[p] for p in s.parameters.values() if p in names),
            _state_bytes(s.code, leaves, [True] * len(leaves), sizes),
            s.code.is_loss or chunk < sizes.get("T", 1),
        )
        for (_, leaves, chunk, sizes), s in zip(calls, selected, strict=True)
    ]


def _owners(chosen: Selection, names: Mapping[nn.Parameter, str]) -> dict[int, str]:
    """Names by input position; adapters come in pairs after the inputs, in order of weights."""
    out = {i: names.get(chosen.parameters[i], f"input {i}") for i in chosen.roles}
    first = len(chosen.wanted) - len(chosen.extra)
    for k, i in enumerate(chosen.adapted):
        out |= {first + 2 * k: f"{out[i]}.up", first + 2 * k + 1: f"{out[i]}.down"}
    return out


__all__ = ["GradientReport", "RegionStep", "known_regions", "region_steps"]
