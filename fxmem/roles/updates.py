"""Running a region's backward with its updates: inside the program in one chunk, else after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import graph as _compat
from fxmem.passes.update_in_backward import UpdateInBackward
from fxmem.program import body_ops as runtime
from fxmem.program.steps import Program
from fxmem.rewriting.pipeline import run_passes
from fxmem.roles import kernel_update
from fxmem.roles.roles import RoleTable
from fxmem.runtime.loops import CallState
from fxmem.runtime.region_code import RegionCode


@dataclass(slots=True)
class TableSink:
    """The gradient of one parameter on its way into the table."""

    parameter: nn.Parameter
    table: RoleTable
    flipped: bool
    uses: kernel_update.Uses

    def product(self, a: Tensor, b: Tensor) -> None:
        """Straight into the weight where the update is plain SGD in its precision."""
        p, table = self.parameter, self.table
        if self.flipped:
            a, b = b.t(), a.t()
        rule = table.rule(p) if table.last(p) else None
        if rule is not None and self.uses("weight_update", p.device, p.dtype):
            factors = table.factors(a, b)
            if factors is not None and kernel_update.move(p, *factors, rule):
                table.complete(p, None)
                return
        rate = table.sgd_rate(p) if table.last(p) else None
        if rate is not None and a.dtype == b.dtype == p.dtype and p.dim() == 2:
            factors = table.factors(a, b)
            if factors is not None:
                p.addmm_(*factors, alpha=-rate)
                table.complete(p, None)
                return
        self.form(a, b)

    def form(self, a: Tensor, b: Tensor) -> None:
        """The gradient ``a @ b``, in float32 at least."""
        p = self.parameter
        if a.dtype == b.dtype == _wide(p):
            grad = torch.mm(a, b)
        else:
            grad = torch.zeros(a.shape[0], b.shape[1], dtype=_wide(p), device=p.device)
            runtime.add_mm(grad, a, b)
        self.table.complete(p, grad.reshape(p.shape))

    def value(self, grad: Tensor) -> None:
        # it may be another value of the program as well
        own = grad.to(_wide(self.parameter), copy=True)
        own = own.t() if self.flipped else own.reshape(self.parameter.shape)
        self.table.complete(self.parameter, own)

    def total(self, add: Callable[..., None], *args: Any) -> None:
        p = self.parameter
        acc = self.table.started(p)
        if acc is None:
            acc = torch.zeros(p.shape, dtype=_wide(p), device=p.device)
        add(acc.t() if self.flipped else acc, *args)
        self.table.complete(p, acc)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


@_compat.no_autocast()
def backward(
    code: RegionCode, variant: str, state: CallState, chunk: int, given: Sequence[Tensor | None],
    updates: dict[int, nn.Parameter], table: RoleTable,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of a region that runs in one chunk; those of ``updates`` that its program consumes
    are None and done.
    """
    kind = "backward" + variant
    causal = code.choose(kind, state, chunk, given).causal
    updating = updating_of(code, kind, causal, tuple(sorted(updates)))
    sinks: list[Any] = [
        TableSink(updates[i], table, f, code.lowering.uses) for i, f in updating.updates
    ]
    return code._run(updating, state, [*given, *sinks], chunk, code.counter, {})


def updating_of(code: RegionCode, kind: str, causal: bool, positions: tuple[int, ...]) -> Program:
    """The program of ``kind`` that consumes gradients; built once."""
    made = _updating(code)
    key = (kind, causal, positions)
    if key not in made:
        base = code.program(kind, causal)
        passes = [UpdateInBackward(position) for position in positions]
        program = replace(base, name=f"{base.name}_update")
        program = made[key] = run_passes(passes, program, program.name)
        code.programs[f"{kind} update {positions}", causal] = program
        code.counter.programs += 1
    return made[key]


def consumed(code: RegionCode, variant: str) -> set[int]:
    """Input positions whose gradient some program of the variant has consumed inside."""
    made = _updating(code).items()
    return {i for (kind, *_), p in made if kind == "backward" + variant for i, _ in p.updates}


def _updating(code: RegionCode) -> dict[tuple[str, bool, tuple[int, ...]], Program]:
    table: dict[tuple[str, bool, tuple[int, ...]], Program]
    table = code.derived.setdefault(("updating",), {})
    return table
