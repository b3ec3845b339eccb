"""How the bodies of loops run, as a plan says: operator by operator, compiled, or with kernels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxmem.caches import Cache
from fxmem.errors import PlanError
from fxmem.kernels.registry import find, kernels
from fxmem.passes.add_products import AddProducts, adds_product
from fxmem.passes.in_place import InPlace
from fxmem.passes.lower_kernels import Found, LowerKernels
from fxmem.passes.order_by_memory import OrderByMemory
from fxmem.plan.plan import Plan
from fxmem.program.steps import Program
from fxmem.rewriting.pipeline import Pass

OFF = "FXMEM_KERNELS_OFF"
_FOUND: Cache[Lowering, list[Found]] = Cache("kernel matches")
_USES: Cache[tuple[Lowering, str, torch.device, torch.dtype], bool] = Cache("kernels in use")


@dataclass(frozen=True, slots=True)
class Lowering:
    """One way; regions that are lowered in different ways share no program.

    Attributes:
        mode: the plan's ``lower``.
        off: kernels that are not used (``FXMEM_KERNELS_OFF=norm,rotary``).
    """

    mode: str
    off: frozenset[str] = frozenset()

    @classmethod
    def of(cls, plan: Plan) -> Lowering:
        """The plan's way, with the switches of the environment.

        Raises:
            PlanError: a switch names no kernel.
        """
        off = frozenset(filter(None, os.environ.get(OFF, "").split(",")))
        known = {k.name for k in kernels()}
        if off - known:
            raise PlanError(
                f"{OFF} names {', '.join(sorted(off - known))}",
                advice=f"kernels: {', '.join(sorted(known))}",
            )
        return cls(plan.lower, off)

    @property
    def found(self) -> list[Found]:
        """What was matched so far in this way."""
        return _FOUND.setdefault(self, [])

    def body_passes(self, device: torch.device) -> Sequence[Pass[fx.Graph]]:
        """Rewrites of every finished chunk body, in order.

        Inductor writes in place by itself, but a product and a sum are two kernels to it.
        """
        if self.mode == "inductor":
            return (InPlace(only=adds_product), AddProducts()) if device.type == "cpu" else ()
        if self.mode == "triton" or (self.mode == "auto" and device.type != "cpu"):
            return (LowerKernels(device, self.found, self.off), OrderByMemory(), InPlace())
        return (OrderByMemory(), InPlace(), AddProducts())

    def tells_nothing(self, values: Sequence[torch.Tensor]) -> bool:
        """Bodies over these are rewritten without a note in :attr:`found`."""
        if self.mode == "auto":
            return all(v.device.type == "cpu" for v in values)
        return self.mode != "triton"

    def uses(self, kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a kernel that the program's runtime calls may run; noted as a match."""
        if self.mode not in ("auto", "triton") or (self.mode == "auto" and device.type == "cpu"):
            return False
        key = (self, kernel, device, dtype)
        if key not in _USES:
            able = find(kernel).available(device, dtype)
            reason = "switched off" if kernel in self.off else able.reason
            self.found.append(Found(kernel, str(dtype).removeprefix("torch."), reason))
            _USES[key] = not reason
        return _USES[key]

    @property
    def late(self) -> bool:
        """Bodies are compiled at their first call: a program that a later length needs for the
        first time would compile then."""
        return self.mode == "inductor"

    def program_passes(self) -> Sequence[Pass[Program]]:
        """Rewrites of every finished program, after all others."""
        if self.mode != "inductor":
            return ()
        from fxmem.backends.inductor import CompileLoops

        return (CompileLoops(),)


def matches() -> Counter[tuple[str, str, str]]:
    """How often each ``(plan's lower, kernel, reason against it)`` was found in this process."""
    return Counter(
        (way.mode, found.kernel, found.reason) for way, every in _FOUND.items() for found in every
    )
