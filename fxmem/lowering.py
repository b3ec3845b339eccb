"""How the bodies of loops run, as a plan says: operator by operator, compiled, or with kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxmem.emit import BodyPass
from fxmem.passes.in_place import InPlace
from fxmem.plan import Plan
from fxmem.program import Program


@dataclass(frozen=True, slots=True)
class Lowering:
    """One way; regions that are lowered in different ways share no program."""

    mode: str

    @classmethod
    def of(cls, plan: Plan) -> Lowering:
        return cls(plan.lower)

    def body_passes(self, device: torch.device) -> Sequence[BodyPass]:
        """Rewrites of every finished chunk body, in order. Inductor writes in place by itself."""
        return () if self.mode == "inductor" else (InPlace(),)

    def finish(self, program: Program) -> None:
        """With Inductor, loops are compiled at their first call."""
        if self.mode == "inductor":
            from fxmem import inductor

            inductor.attach(program)
