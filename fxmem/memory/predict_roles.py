"""Predicted memory of a step with roles: :class:`~fxmem.memory.predict.Step` with the variants
that ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import graph as _compat
from fxmem._compat.memory import StorageWatch
from fxmem.compiler.step import CompiledGraph
from fxmem.frontend.parameter_free import Leaf
from fxmem.memory.predict import Prediction, Saved, Step, Use
from fxmem.roles.kernel_update import Rule
from fxmem.roles.roles import Role, RoleTable
from fxmem.roles.updates import TableSink, updating_of
from fxmem.runtime.profile import inside_op, run_fake


def predict_roles(graph: CompiledGraph, sizes: Mapping[str, int]) -> Prediction:
    """Memory of a step with the roles of the latest one; see :func:`fxmem.memory.predict.predict`.

    Low-rank terms and the optimizer's state are there before, as parameters are.
    """
    return RoleStep(graph, dict(sizes)).predict()


class Rehearsal(RoleTable):
    """Takes gradients on fake tensors; allocates what the table would, and remembers what waits.

    ``weights``: fake weights by parameter.
    """

    def __init__(self, table: RoleTable, expected: Mapping[nn.Parameter, int]) -> None:
        super().__init__()
        self.table = table
        self.weights: dict[nn.Parameter, Tensor] = {}
        self._expected = dict(expected)

    def sgd_rate(self, parameter: nn.Parameter) -> float | None:
        return self.table.sgd_rate(parameter)

    def rule(self, parameter: nn.Parameter) -> Rule | None:
        return self.table.rule(parameter)

    def update(self, parameter: nn.Parameter, grad: Tensor) -> None:
        if self.table.rehearse(parameter, self.weights[parameter], grad):
            self._sums[parameter] = grad


class _Sink(TableSink):
    """`parameter` decides, its fake weight is written."""

    def product(self, a: Tensor, b: Tensor) -> None:
        p, table = self.parameter, self.table
        weight = table.weights[p]  # type: ignore[attr-defined]
        sole = table.last(p) and a.dtype == b.dtype and weight.dim() == 2
        if (sole and table.sgd_rate(p) is not None and a.dtype == weight.dtype) or (
            sole and table.rule(p) and self.uses("weight_update", weight.device, weight.dtype)
        ):
            self.table.complete(self.parameter, None)
        else:
            self.form(a, b)


class RoleStep(Step):
    """The replay with roles; ``sums``: storages of gradients that wait, by UPDATE parameter."""

    def __init__(self, graph: CompiledGraph, sizes: dict[str, int]) -> None:
        super().__init__(graph, sizes, graph.holding.moved())
        assert graph.table is not None
        self.table = graph.table
        self.expected = Counter(p for s in graph.selected for p in s.updates.values())
        self.sums: dict[nn.Parameter, Any] = {}
        self.whole = graph.plan.stream is None or graph.chunker.whole(sizes)

    def late_gradient(self, weight: Leaf, size: int) -> tuple[int, int]:
        parameter = self.graph.weight(weight)
        assert isinstance(parameter, nn.Parameter), "it is alive, since its model is"
        role = self.table.role(parameter)
        return (size if role is Role.ACTIVE else 0, size if role is Role.UPDATE else 0)

    def use(self, index: int) -> Use:
        chosen, call = self.graph.selected[index], self.graph.calls[index]
        own, updates = call.sizes(self.sizes), bool(chosen.updates)
        chunk = self.graph.chunker(call, self.sizes, updates=updates)
        chunk = own.get("T", 1) if self.whole else chunk
        kind = "loss" + chosen.variant if chosen.learns and chosen.code.early else "forward"
        return Use(chosen.code, own, chunk, kind, "backward" + chosen.variant, chosen.learns)

    def region(self, index: int, entry: Saved, tangents: list[Any]) -> list[Any]:
        chosen, use = self.graph.selected[index], entry.use
        ties = any(i in entry.call.shared for i, r in chosen.roles.items() if r is Role.ACTIVE)
        if not chosen.updates or ties or use.chunk < use.sizes.get("T", 1):
            return super().region(index, entry, [])  # its tangents are not written over
        causal = (use.backward, False) not in use.code.programs
        updating = updating_of(use.code, use.backward, causal, tuple(sorted(chosen.updates)))
        table = Rehearsal(self.table, self.expected)
        names = updating.inputs
        sinks = names[len(names) - len(updating.updates) :]

        def fill(env: dict[str, Any]) -> None:
            table.weights = {p: env[names[i]] for i, p in chosen.updates.items()}
            table._sums = {p: torch.empty(p.shape) for p in table.weights if p in self.sums}
            for name, (i, flipped) in zip(sinks, updating.updates, strict=True):
                env[name] = _Sink(chosen.updates[i], table, flipped, use.code.lowering.uses)

        devices = [v.device for v in use.code.values]
        run = run_fake(updating, use.sizes, use.chunk, devices, (), fill)
        self._masks(entry.call, run)
        self.ledger.mark(f"backward {entry.call.modules}", run.peak)
        for i, _ in updating.updates:
            p = chosen.updates[i]
            waits = table._sums.get(p)
            self._keep(p, ("sum", p), 0 if waits is None else waits.nbytes)
        return self._results(("backward", index), run)

    def take(self, index: int, entry: Saved, gradients: list[Any]) -> None:
        chosen, leaves = self.graph.selected[index], list(entry.call.leaves)
        for i in chosen.adapted:
            leaves += [("input", f"{leaves[i][1]}.up"), ("input", f"{leaves[i][1]}.down")]
        for i, gradient in enumerate(gradients):
            if gradient is not None and i not in chosen.updates:
                returned = chosen.roles.get(i) is Role.ACTIVE or i in chosen.reduced
                storage, output = gradient
                self._accumulate(leaves[i], storage, output, i in entry.call.shared and returned)
        for i, parameter in chosen.reduced.items():
            if not self._rehearse(parameter, 0)[0]:
                self.groups.used.add(leaves[i])
        for i, parameter in chosen.updates.items():
            if gradients[i] is not None:
                storage, output = gradients[i]
                stays, spent = self._rehearse(parameter, output.bytes)
                self.ledger.mark("update", spent)
                self._keep(parameter, storage, output.bytes if stays else 0)
                self.ledger.release(storage)
                gradients[i] = None

    def _started(self, index: int, entry: Saved) -> list[str]:
        use, chosen = entry.use, self.graph.selected[index]
        program = use.code.program(use.backward)
        sums = {b.name for loop in program.loops for b in loop.allocate if b.zero}
        own = [program.outputs[i] for i, p in chosen.updates.items() if p in self.sums]
        return [*super()._started(index, entry), *(n for n in own if n in sums)]

    def _keep(self, parameter: nn.Parameter, storage: Any, size: int) -> None:
        """One gradient has come; ``size`` bytes of its sum wait in ``storage``, or none."""
        self.expected[parameter] -= 1
        if size and parameter not in self.sums:
            self.ledger.hold(storage, size)
            self.sums[parameter] = storage
        elif not size and parameter in self.sums:
            self.ledger.release(self.sums.pop(parameter))

    def _rehearse(self, parameter: nn.Parameter, size: int) -> tuple[bool, int]:
        """Whether a gradient of ``size`` bytes stays, and what its update takes."""
        if self.expected[parameter] > 1:
            return True, 0
        watch = StorageWatch(inside_op)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        dtype = wide if size >= parameter.numel() * wide.itemsize else parameter.dtype
        with _compat.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            weight = torch.empty(parameter.shape, dtype=parameter.dtype)
            grad = torch.empty(parameter.shape, dtype=dtype)
            watch.ignore([weight, grad])
            with watch:
                stays = self.table.rehearse(parameter, weight, grad)
        return stays, watch.peak


__all__ = ["predict_roles"]
