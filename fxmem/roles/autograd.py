"""Running a region whose parameters have roles.

As :class:`~fxmem.runtime.autograd.Run`, with two differences: autograd sees only the inputs whose
gradients are returned, and gradients of UPDATE parameters go to the role table. A region that runs
in one chunk hands them over inside its program, one alive at a time; one that runs in several needs
its weights until its last chunk, so their sums are handed over after it, one by one. Where
parameters are sharded, all gradients go to what reduces them, and the table takes those of updates
from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import graph as _compat
from fxmem.axes.sizes import evaluate_shape
from fxmem.errors import BackwardTwiceError, ModifiedParameterError
from fxmem.roles.roles import Role, RoleTable
from fxmem.roles.updates import backward as updates_in
from fxmem.roles.variants import Selection
from fxmem.runtime.autograd import Run, run_region
from fxmem.runtime.loops import CallState
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.sharding import RegionShards
from fxmem.runtime.shared_grads import Shared


@dataclass(slots=True)
class Step:
    """What the regions of one call share.

    Attributes:
        table: at its forward; ``generation`` is the table's of that time.
        updates: some region of the call updates weights in its backward.
        read: weights that backwards will read, with their versions at the forward.
        expected: parameters whose gradients the table expects of the call.
        entered: number of the latest backward pass that has entered a region of the call.
    """

    table: RoleTable
    updates: bool
    generation: int
    read: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    expected: list[nn.Parameter] = field(default_factory=list)
    entered: int = -1


@dataclass(slots=True)
class RoleRun(Run):
    """One region of one call; ``done``: its backward has run."""

    selection: Selection = field(kw_only=True)
    step: Step = field(kw_only=True)
    done: bool = False

    @classmethod
    def of(
        cls, selection: Selection, step: Step, state: CallState, chunk: int, seed: Tensor | None,
        shared: Shared, away: Sequence[bool], shards: RegionShards | None,
    ) -> RoleRun:  # fmt: skip
        """Of tied parameters autograd gets the gradients that are returned; those of updates wait
        in the table.
        """
        code, roles, reduced = selection.code, selection.roles, selection.reduced
        returned = {i: s for i, s in shared.items() if roles.get(i) is Role.ACTIVE or i in reduced}
        sole = [False] * len(code.differentiable)
        return cls(
            code, state, chunk, seed, returned, sole, away=away, shards=shards,
            selection=selection, step=step,
        )  # fmt: skip

    def variant(self, code: RegionCode, wanted: Sequence[bool]) -> str:
        """Of autograd's wishes nothing follows: it does not see the updates."""
        return self.selection.variant

    def remember(self, saved: Sequence[Tensor | None]) -> None:
        updates, reduced = self.selection.updates, self.selection.reduced
        self.step.read += [
            (p, p._version) for i, p in self.selection.parameters.items()
            if saved[i] is not None or i in updates or i in reduced
        ]  # fmt: skip
        for parameter in updates.values():
            self.step.table.expect(parameter)
        for parameter in reduced.values():
            self.step.table.expect_reduced(parameter)
        self.step.expected += [*updates.values(), *reduced.values()]

    def enter(self) -> None:
        """Raise, before anything has changed, where weights are not those of the forward."""
        step = self.step
        if self.done and step.updates:
            raise BackwardTwiceError(
                "a second backward through a forward whose gradients updated weights",
                advice="run the forward again",
            )
        number = _compat.backward_id()
        if step.entered == number:
            return  # from here on this backward's own updates change weights
        moved = any(p._version != version for p, version in step.read)
        stepped = step.updates and step.table.generation != step.generation
        if moved or stepped:
            if not stepped:  # this forward has no backward any more; others need not wait for it
                step.table.forget(step.expected)
                step.expected = []
            raise ModifiedParameterError(
                "weights changed, or the optimizer stepped, between a forward and its backward"
            )
        step.entered = number
        step.table.begin_backward(number)

    def backward(
        self, ctx: Any, saved: Sequence[Any], given: Sequence[Tensor | None], free: Sequence[bool]
    ) -> list[Tensor | None]:
        code, updates, table = self.code, self.selection.updates, self.step.table
        shaped = [code.joint.info[t] for t in code.joint.tangents if t is not None]
        full = [t if t is not None else torch.zeros(
            evaluate_shape(s.shape, self.state.sizes), dtype=s.dtype, device=code.device
        ) for t, s in zip(given, shaped, strict=True)]  # fmt: skip
        if updates and not self.shared and self.chunk >= self.state.sizes.get("T", 1):
            operands = [*saved, self.seed, *full]
            out = updates_in(code, ctx.variant, self.state, self.chunk, operands, updates, table)
        else:
            start = self.state.shared.take(self.shared)
            for i, parameter in updates.items():
                if (part := table.started(parameter)) is not None:
                    start[i] = part
            out = code.backward(
                self.state, self.chunk, saved, self.seed, full, start, ctx.variant, free
            )
        # not the zeros of what depends on no tangent: plain PyTorch has no gradient there
        there = _reached(code, [t is not None for t in given])
        kept = {*updates, *self.selection.reduced, *self.shared}
        return [g if r or i in kept else None
                for i, (g, r) in enumerate(zip(out, there, strict=True))]  # fmt: skip

    def hand_in(self, grads: list[Tensor | None], nodes: Sequence[Any]) -> None:
        """The table gets one gradient per update, the last parameter's first."""
        self.done = True
        for parameter in self.selection.reduced.values():
            self.step.table.arrive(parameter)
        Run.hand_in(self, grads, nodes)
        for i, parameter in reversed(self.selection.updates.items()):
            grad, grads[i] = grads[i], None
            if grad is not None:  # else its update ran in the program
                self.step.table.complete(parameter, grad)
            del grad


def _reached(code: RegionCode, there: Sequence[bool]) -> list[bool]:
    """Which gradients depend on the tangents that are there."""
    known: dict[tuple[bool, ...], list[bool]] = code.derived.setdefault(("reached",), {})
    if (key := tuple(there)) not in known:
        joint = code.joint
        tangents = [t for t in joint.tangents if t is not None]
        after = {t for t, given in zip(tangents, there, strict=True) if given}
        for node in joint.graph.nodes:
            if any(n in after for n in node.all_input_nodes):
                after.add(node)
        known[key] = [g in after for g in joint.grads]
    return known[key]


_ANCHORS: dict[torch.device, Tensor] = {}


def _anchor(device: torch.device) -> Tensor:
    if device not in _ANCHORS:
        _ANCHORS[device] = torch.empty(0, device=device, requires_grad=True)
    return _ANCHORS[device]


def run_selected(run: RoleRun, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Outputs of a region; autograd enters only where the selection learns."""
    chosen = run.selection
    given = [*tensors, *chosen.extra]
    # without shards (a loss outside the call) autograd hands gradients to what reduces them
    taken = {**chosen.updates, **(chosen.reduced if run.shards is not None else {})}
    seen = [
        t if w and i not in taken else t.detach()
        for i, (t, w) in enumerate(zip(given, chosen.wanted, strict=True))
    ]
    return run_region(run, seen, _anchor(given[0].device) if chosen.learns else None)


__all__ = ["RoleRun", "Step", "run_selected"]
