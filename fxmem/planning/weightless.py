"""A model without its weights, and its capture: shapes are all that a plan needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem import api
from fxmem._compat.capture_stack import stand_in
from fxmem.compiler.region_codes import _adapted
from fxmem.compiler.step import CompiledGraph, bind_sizes
from fxmem.dynamo_backend import Backend
from fxmem.errors import PlanError
from fxmem.frontend.parameter_free import Leaf
from fxmem.plan.plan import Plan, Stream
from fxmem.roles.roles import Role, RoleTable
from fxmem.roles.variants import select


@dataclass(frozen=True, slots=True)
class Captured:
    """A training step in shapes.

    Attributes:
        model: the model, its tensors without memory.
        graph: its capture.
        sizes: the sizes of the call that was captured, by symbol; ``T`` is the length.
        arguments: of that call.
    """

    model: nn.Module
    graph: CompiledGraph
    sizes: dict[str, int]
    arguments: dict[Leaf, Any]

    def at(self, length: int) -> dict[str, int]:
        """The sizes of a call of another length."""
        return {**self.sizes, "T": length}

    def training(self, learning: Collection[str]) -> CompiledGraph:
        """The graph when only the parameters of these names learn."""
        roles = {
            p: Role.ACTIVE if name in learning else Role.FROZEN
            for name, p in self.model.named_parameters()
        }
        graph = copy.copy(self.graph)
        graph.table = RoleTable(roles)
        codes = [(c.code, c.leaves, c.outputs) for c in graph.calls]
        graph.selected = select(codes, self.arguments, graph.table, _adapted, armed=False)
        return graph


def _without_memory(tensor: Tensor) -> Tensor:
    return stand_in(tensor.shape, tensor.stride(), tensor.dtype, torch.device("cpu"), False, ())


def without_weights(
    model: nn.Module, like: Callable[[Tensor], Tensor] = _without_memory
) -> nn.Module:
    """A copy whose parameters and buffers are ``like`` the model's; by default tensors of a CPU
    that have no memory.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = like(tensor)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def capture(model: nn.Module, length: int, batch: int) -> Captured:
    """Capture a step of a model :func:`without_weights` on ``batch`` sequences of token ids, which
    it takes as ``input_ids`` and ``labels``; nothing runs.

    Raises:
        PlanError: the step has no length that may vary, or returns no loss.
        FxmemError: it cannot be captured.
    """
    engine = api.install(model, Plan(stream=Stream()), _Capturing)
    assert isinstance(engine, _Capturing)
    ids = torch.zeros(batch, length, dtype=torch.long)
    model(input_ids=ids, labels=ids)
    if not engine.graphs or "T" not in engine.sizes:
        raise PlanError(
            f"{type(model).__name__} has no length that may vary", advice="see fxmem.explain"
        )
    return Captured(model, engine.graphs[-1], engine.sizes, engine.arguments)


class _Capturing(Backend):
    """Captures, and gives back values without meaning in place of running."""

    divides = False  # no code may run on these
    sizes: dict[str, int]
    arguments: dict[Leaf, Any]

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], last: bool) -> Any:
        self.sizes = {}
        found = super()._compile(gm, example_inputs, last)
        return partial(self._answer, found) if isinstance(found, CompiledGraph) else found

    def _answer(self, graph: CompiledGraph, *args: Any) -> list[Any]:
        self.sizes = bind_sizes(graph.capture, args)
        named = zip(graph.capture.inputs, args, strict=True)
        self.arguments = {("input", node.name): value for node, value in named}
        values = [getattr(o, "value", o) for o in graph.capture.outputs]
        values = [v.meta["example_value"] if isinstance(v, fx.Node) else v for v in values]
        return [
            torch.zeros([1] * v.dim(), dtype=v.dtype) if isinstance(v, Tensor) else v
            for v in values
        ]
