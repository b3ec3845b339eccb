"""The public calls: ``transform``, ``restore``, ``explain`` and the ``torch.compile`` backend."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem import _compat
from fxmem.blocks import adapters
from fxmem.blocks.attach import attach, detach, state_of
from fxmem.blocks.roles import RoleSource, RoleTable
from fxmem.blocks.state import BlockState
from fxmem.capture import has_varying_size
from fxmem.compiled import CompiledGraph, compile_graph
from fxmem.errors import (
    CaptureError,
    FxmemError,
    FxmemWarning,
    NotTransformedError,
    PlanError,
    RoleError,
)
from fxmem.experts import streamable
from fxmem.plan import Plan, Stream, check_names
from fxmem.prune.materialize import materialize


class Backend:
    """A Dynamo backend for one plan; ``graphs`` are the captures it has compiled."""

    def __init__(self, plan: Plan, roles: RoleSource | None = None) -> None:
        self.plan, self.roles = plan, roles
        self.graphs: list[CompiledGraph] = []

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        learns = torch.is_grad_enabled() and any(
            isinstance(v, Tensor) and v.requires_grad for v in example_inputs
        )
        if not learns or (self.plan.stream is None and self.roles is None):
            return gm.forward
        symbolic = any(isinstance(v, torch.SymInt) for v in example_inputs)
        # a list: every input is marked, not only the first
        if not symbolic and any(
            [_compat.mark_dynamic(t) for t in _compat.dynamic_inputs(gm, example_inputs)]
        ):
            _compat.restart_capture("fxmem streams a symbolic length")
        if not has_varying_size(gm) and self.roles is not None:
            return _raiser(RoleError(_not_streamed("split into regions")))
        if not has_varying_size(gm):
            warnings.warn(_not_streamed("streamed"), FxmemWarning, stacklevel=2)
            return gm.forward
        try:
            graph = compile_graph(gm, example_inputs, self.plan, self.roles)
        except FxmemError as error:
            # raised from the call, so that it reaches the user as itself and not wrapped by Dynamo
            return _raiser(error)
        self.graphs.append(graph)
        return graph


def _not_streamed(done: str) -> str:
    places = _compat.fixed_sizes()
    return (
        f"no input has a length that may vary, so nothing is {done}: the model fixes its sizes "
        "(constants of the input's length, or one token only)"
        + (f"; fixed at {'; '.join(places)}" if places else "")
    )


def _raiser(error: FxmemError) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


def backend(plan: Plan | None = None) -> Backend:
    """The backend callable for ``plan`` (default: streaming with automatic chunks)."""
    return Backend(Plan(stream=Stream()) if plan is None else plan)


def fxmem_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None
) -> Callable[..., Any]:
    """Entry point of ``torch.compile(..., backend="fxmem", options={"plan": plan})``."""
    try:
        plan = _plan_of(options)
    except FxmemError as error:
        return _raiser(error)
    return Backend(plan)(gm, example_inputs)


def _plan_of(options: Any) -> Plan:
    given = dict(options or {})
    check_names("backend 'fxmem'", given, ("plan",))
    plan = given.get("plan") or Plan(stream=Stream())
    if not isinstance(plan, Plan):
        raise PlanError(f"option 'plan' must be a fxmem.Plan, not {type(plan).__name__}")
    return plan


NO_DDP = "give the model itself, one process each, and Blocks(average=True)"
RECAPTURES = 64
"""Captures per model (train and eval, with and without a mask, autocast states) before an error."""

_TRANSFORMED: weakref.WeakKeyDictionary[nn.Module, Backend] = weakref.WeakKeyDictionary()


def transform(model: nn.Module, plan: Plan) -> nn.Module:
    """Make training steps of ``model`` follow ``plan``; returns the same module, changed in place.

    Class, parameters, ``state_dict``, ``save_pretrained`` and ``generate`` stay as they are. Calls
    without gradients (evaluation, generation) run the original forward. With ``plan.prune`` the
    result is a new, smaller model and the given one stays as it is.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a fxmem.Plan, not {type(plan).__name__}")
    if plan.prune is not None:
        model = materialize(model, plan.prune)
        plan = replace(plan, prune=None)
        if plan.stream is None and plan.blocks is None:
            return model
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise PlanError(
            f"the model is wrapped by {type(model).__name__}, which averages gradients",
            advice="transform the model itself, then wrap it" if plan.blocks is None else NO_DDP,
        )
    state = BlockState(model, plan.blocks) if plan.blocks is not None else None
    engine = Backend(plan)
    compiled = torch.compile(  # type: ignore[call-overload]  # options that the stub lacks
        _compat.call_impl(model), backend=engine, fullgraph=True, isolate_recompiles=True,
        recompile_limit=RECAPTURES,
    )  # fmt: skip
    plain = _compat.call_impl(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        for leaf in _compat.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                _compat.mark_dynamic(leaf)
        if engine.roles is not None:
            engine.roles.armed = model.training
            if _compat.inside_ddp():
                raise RoleError(
                    "DistributedDataParallel averages gradients after blocks have used them",
                    advice=NO_DDP,
                )
        try:
            with _compat.capture_config(), streamable(model):
                return compiled(*args, **kwargs)
        except _compat.BackendCompilerFailed:
            raise  # a fault of fxmem, not of the model
        except _compat.TorchDynamoException as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be captured", reason=str(error)
            ) from error

    _compat.set_compiled_call(model, call)
    _TRANSFORMED[model] = engine
    detach(model)
    if state is not None:
        attach(model, state)
        use_roles(model, state.table)
    return model


def merge_low_rank(model: nn.Module) -> int:
    """Add the low-rank terms of ``Blocks(inactive=LowRank(...))`` to their weights, once, at the
    end of training; in float32 or wider, then rounded to the weights' precision.

    Returns:
        The number of weights that changed.

    Raises:
        NotTransformedError: the model has no block state.
    """
    return adapters.merge(model, state_of(model).adapters)


def use_roles(model: nn.Module, table: Callable[[], RoleTable | None]) -> None:
    """Let the training steps of a transformed model follow a role table, read at every forward.

    Call it before the first step: what is captured without roles stays without.

    Raises:
        NotTransformedError: the model was not transformed.
        RoleError: the model has been captured already.
    """
    if model not in _TRANSFORMED:
        raise NotTransformedError(f"{type(model).__name__} was not transformed")
    engine = _TRANSFORMED[model]
    if engine.graphs and engine.roles is None:
        raise RoleError(
            f"{type(model).__name__} was captured without roles",
            advice="give the roles before the first step, or transform the model anew",
        )
    engine.roles = RoleSource(table, model.training)
    for graph in engine.graphs:
        graph.roles = engine.roles


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`transform`."""
    if model not in _TRANSFORMED:
        raise NotTransformedError(f"{type(model).__name__} was not transformed")
    _compat.unset_compiled_call(model)
    detach(model)
    del _TRANSFORMED[model]
    return model
