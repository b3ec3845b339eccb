"""A sub-model with gates on all its units: what a search by gates runs many times."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.prune.shrink.empty_layers import padded
from fxmem.prune.shrink.gate_gradients import Gates
from fxmem.prune.shrink.made import reduced
from fxmem.prune.shrink.materialize import cut_out
from fxmem.prune.units.masks import Masks
from fxmem.prune.units.units import Coupling


class GatedSubmodel:
    """The sub-model of some masks, and the derivatives of its loss by gates inside it.

    Args:
        model: the dense model, unchanged; what is not cut is shared with it, not copied.
        plan: its coupling.
        masks: units that the sub-model holds.
        names: groups that get gates.
        device: where the sub-model runs; the dense model stays where it is.
        prepare: called with the sub-model once it has its gates; what it returns runs.
    """

    def __init__(
        self, model: nn.Module, plan: Coupling, masks: Masks, names: Collection[str],
        device: torch.device | str | None = None,
        prepare: Callable[[nn.Module], Any] | None = None,
    ) -> None:  # fmt: skip
        small = cut_out(model, masks, plan, share=True)
        if device is not None:
            small = small.to(device)
        self.device = next(small.parameters()).device
        held, _ = padded(model, plan, masks)
        self.sizes = {g.name: g.size for g in plan.groups if g.name in names}
        self.kept = {name: torch.tensor(held.kept(name), dtype=torch.long) for name in self.sizes}
        groups = [g for g in reduced(plan, held).groups if g.name in names and g.size]
        self.gates = Gates(small, groups).__enter__()
        if prepare is not None:
            self.gates.run = prepare(small)

    def __call__(
        self, batch: Mapping[str, Any], inside: Mapping[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and derivatives by the gates, float64 (size,) per group of the dense model.

        Args:
            batch: keyword arguments of the model, with labels.
            inside: bool (size,) per group of the dense model; units outside the sub-model count as
                closed, and their derivatives are 0.
        """
        masks = {g.name: inside[g.name][self.kept[g.name]] for g in self.gates.groups}
        loss, found = self.gates(on(self.device, batch), masks)
        out = {}
        for name, size in self.sizes.items():
            out[name] = torch.zeros(size, dtype=torch.float64)
            if name in found:
                out[name][self.kept[name]] = found[name]
        return loss, out


def on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose tensors are on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
