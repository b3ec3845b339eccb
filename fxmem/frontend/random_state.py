"""The state of random generators, so that a call can start again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """Of the CPU's generator and of those of the accelerators in use."""

    cpu: Tensor
    others: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> RandomState:
        """``tensors``: on the devices in use."""
        devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        found = [(d, getattr(torch, d.type).get_rng_state(d)) for d in sorted(devices, key=str)]
        return cls(torch.get_rng_state(), tuple(found))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            getattr(torch, device.type).set_rng_state(state, device)


__all__ = ["RandomState"]
