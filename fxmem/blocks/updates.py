"""Running a region's backward with its updates: inside the program in one chunk, else after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxmem import runtime
from fxmem.blocks import kernel_update
from fxmem.blocks.roles import RoleTable
from fxmem.executor import CallState
from fxmem.passes.update_in_backward import Updating, update_in_backward
from fxmem.region_code import RegionCode


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
        if kernel_update.move(p, a, b, rule, self.uses, table.factors):
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
        TableSink(updates[i], table, f, code.lowering.uses)
        for i, f in zip(updating.positions, updating.flipped, strict=True)
    ]
    return code._run(updating.program, state, [*given, *sinks], chunk, code.counter, {})


_UPDATING: dict[tuple[int, str, bool, tuple[int, ...]], Updating] = {}


def updating_of(code: RegionCode, kind: str, causal: bool, positions: tuple[int, ...]) -> Updating:
    """The program of ``kind`` that consumes gradients; built once."""
    key = (id(code), kind, causal, positions)
    if key not in _UPDATING:
        made = _UPDATING[key] = update_in_backward(code.program(kind, causal), positions)
        code.programs[f"{kind} update {positions}", causal] = made.program
        code.counter.programs += 1
    return _UPDATING[key]


def consumed(code: RegionCode, variant: str) -> set[int]:
    """Input positions whose gradient some program of the variant has consumed inside."""
    kind = "backward" + variant
    made = [u for (key, k, _, _), u in _UPDATING.items() if key == id(code) and k == kind]
    return {i for u in made for i in u.positions}
