"""The public calls: ``transform``, ``restore``, ``explain`` and the ``torch.compile`` backend."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem._compat import errors as _compat_errors
from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat import recorded_outputs, tracing
from fxmem._compat.capture_stack import keep_symbolic
from fxmem._compat.dynamo_gaps import answered
from fxmem._compat.trl import plain_head
from fxmem.blocks import adapters
from fxmem.blocks.attach import attach, detach, state_of
from fxmem.blocks.state import BlockState
from fxmem.compiler.compile import compile_graph
from fxmem.compiler.evaluation import Evaluation
from fxmem.compiler.step import CompiledGraph
from fxmem.compiler.training_step import check_called
from fxmem.deferred.recorder import Recorder
from fxmem.deferred.tensor import settle
from fxmem.distributed import fsdp2
from fxmem.distributed.fsdp2 import ShardedModel
from fxmem.errors import (
    CaptureError,
    FxmemError,
    FxmemWarning,
    InternalError,
    NotTransformedError,
    PlanError,
    RoleError,
)
from fxmem.frontend import faults
from fxmem.frontend.capture import has_varying_size
from fxmem.frontend.experts import streamable
from fxmem.frontend.flags import Flags
from fxmem.frontend.inputs import named, uniform
from fxmem.frontend.opaque import Opaque
from fxmem.frontend.recurrences import carried_kernels
from fxmem.plan import carry
from fxmem.plan.plan import Plan, Stream, check_names
from fxmem.prune.shrink.materialize import materialize
from fxmem.roles.roles import RoleSource, RoleTable
from fxmem.runtime import sharding


class Backend:
    """A Dynamo backend for one plan; ``graphs`` are the captures it has compiled.

    ``raises``: errors leave through Dynamo, which then keeps no capture: the next call tries again.
    ``recorder``: takes wide outputs that are not computed in the call. ``one``: a capture is one
    region. ``idle``: calls without gradients stream too. ``told``: operators and calls that a
    warning has named. ``states``: the call asks for states of the model.
    """

    def __init__(
        self, plan: Plan, roles: RoleSource | None = None, *, raises: bool = False,
        recorder: Recorder | None = None, one: bool = False, idle: bool = False,
        told: set[str] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.roles, self.raises = plan, roles, raises
        self.recorder, self.one, self.idle = recorder, one, idle
        self.told = set() if told is None else told
        self.flags = Flags()
        self.graphs: list[CompiledGraph] = []
        self.sharded: ShardedModel | None = None
        self.states = False
        self.opaque: Callable[[], Opaque | None] = lambda: None

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        try:
            if not self.flags.captured(watched=any(map(_compat_hooks.is_hook, gm.graph.nodes))):
                raise CaptureError("the capture depends on which parameters require a gradient")
            # values of a trace are nothing that a checkpoint or an offload of the caller's saves
            with tracing.nothing_saved(), keep_symbolic(set()):
                return self.flags.run(self._compile(gm, example_inputs))
        except _compat_errors.RestartAnalysis:
            raise
        except Exception as error:
            named = faults.compiler_fault(error, "compiling this model")
            if self.raises:
                raise named from (None if named is error else error)
            if not torch.is_grad_enabled():
                warnings.warn(f"without gradients: {named}", FxmemWarning, stacklevel=2)
                return gm.forward
            return _raiser(named, None if named is error else error)

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        learns = torch.is_grad_enabled() and any(
            isinstance(v, Tensor) and v.requires_grad for v in example_inputs
        )
        if not (learns or self.idle) or (self.plan.stream is None and self.roles is None):
            return _unstreamed(gm)
        if _compat.mark_inputs(gm, example_inputs):
            _compat.restart_capture("fxmem streams a symbolic length")
        if not has_varying_size(gm) and self.roles is not None:
            raise RoleError(_not_streamed("split into regions"))
        if not has_varying_size(gm):
            warnings.warn(_not_streamed("streamed"), FxmemWarning, stacklevel=2)
            return _unstreamed(gm)
        late = None if self.recorder is None else self.recorder.output
        graph = compile_graph(
            gm, example_inputs, self.plan, self.roles, late=late, one=self.one, states=self.states,
            learns=learns, told=self.told,
        )  # fmt: skip
        if graph.capture.fixes_length:
            warnings.warn(
                f"an operator's trace fixes the length{_fixed_at()}: exact, but every length is "
                "captured anew", FxmemWarning, stacklevel=2,
            )  # fmt: skip
        self.graphs.append(graph)
        return graph


def _unstreamed(gm: fx.GraphModule) -> Callable[..., Any]:
    if sharding.current() is None:
        return gm.forward
    return _raiser(sharding.NotStreamedError("this capture does not stream"))


def _not_streamed(done: str) -> str:
    return (
        f"no input has a length that may vary, so nothing is {done}: the model fixes its sizes "
        f"(constants of the input's length, or one token only){_fixed_at()}"
    )


def _fixed_at() -> str:
    places = _compat.fixed_sizes()
    return f"; fixed at {'; '.join(places)}" if places else ""


def _raiser(error: Exception, cause: BaseException | None = None) -> Callable[..., Any]:
    """Raises from the call, so that the error reaches the user as itself, not wrapped by Dynamo."""

    def call(*_: Any) -> Any:
        raise error.with_traceback(None) from cause

    return call


def backend(plan: Plan | None = None) -> Backend:
    """The backend callable for ``plan`` (default: streaming with automatic chunks)."""
    plan = Plan(stream=Stream()) if plan is None else plan
    told: set[str] = set()
    return Backend(plan, recorder=_recorder(plan, told), idle=True, told=told)


def fxmem_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None,
    mode: str | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Entry point of ``torch.compile(..., backend="fxmem", options={"plan": plan})``.

    ``mode`` names presets of Inductor, which do not apply here: the plan says how bodies run.
    """
    try:
        plan = _plan_of(options)
    except FxmemError as error:
        return _raiser(error)
    return backend(plan)(gm, example_inputs)


def _plan_of(options: Any) -> Plan:
    given = dict(options or {})
    check_names("backend 'fxmem'", given, ("plan",))
    plan = given.get("plan") or Plan(stream=Stream())
    if not isinstance(plan, Plan):
        raise PlanError(f"option 'plan' must be a fxmem.Plan, not {type(plan).__name__}")
    return plan


NO_DDP = "give the model itself, one process each, and Blocks(average=True)"
NO_SHARDS = "train without fully_shard, or without Plan(blocks=...)"
RECAPTURES = 64
"""Captures per model (train and eval, with and without a mask, autocast states) before an error."""

_TRANSFORMED: weakref.WeakKeyDictionary[nn.Module, Backend] = weakref.WeakKeyDictionary()


def transform(model: nn.Module, plan: Plan | None = None) -> nn.Module:
    """Make training steps of ``model`` follow ``plan`` (default: streaming with automatic chunks);
    returns the same module, changed in place.

    Class, parameters, ``state_dict``, ``save_pretrained`` and ``generate`` stay as they are. Calls
    without gradients stream too, but for decoding and small ones. Deep copies and pickles
    follow the plan as well, except for ``plan.blocks``. With ``plan.prune`` the result is a new,
    smaller model and the given one stays as it is. Of a DistributedDataParallel the model inside is
    transformed; parameters that ``fully_shard`` has spread, before or after, stay where they are.

    Raises:
        PlanError: the plan cannot work with this model.
    """
    plan = Plan(stream=Stream()) if plan is None else plan
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a fxmem.Plan, not {type(plan).__name__}")
    if plan.prune is not None:
        model = materialize(model, plan.prune)
        plan = replace(plan, prune=None)
        if plan.stream is None and plan.blocks is None:
            return model
    if isinstance(model, nn.parallel.DistributedDataParallel) and plan.blocks is None:
        transform(model.module, plan)
        return model
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise PlanError(
            f"the model is wrapped by {type(model).__name__}, which averages gradients",
            advice="transform the model itself, then wrap it" if plan.blocks is None else NO_DDP,
        )
    check_called(model)
    state = BlockState(model, plan.blocks) if plan.blocks is not None else None
    install(model, plan)
    carry.attach(model, plan, install)
    detach(model)
    if state is not None:
        attach(model, state)
        use_roles(model, state.table)
    return model


def install(model: nn.Module, plan: Plan) -> None:
    """Replace the call of ``model``, which may still be without its attributes."""
    stream = plan.stream
    told: set[str] = set()
    # weak: what a Backend has compiled must go with the model, not with a later collection
    recorder = _recorder(plan, told, lambda: getattr(this(), "roles", None))
    engine = Backend(plan, raises=True, recorder=recorder, told=told)
    this, opaque = weakref.ref(engine), Opaque(model)
    engine.opaque = weakref.ref(opaque)
    # a capture without gradients has nothing to share with one that learns
    idle = Backend(plan, raises=True, recorder=recorder, idle=True, told=told)
    plain = _compat.call_impl(model)

    @functools.cache
    def compiled(of: Backend, _: Hashable) -> Callable[..., Any]:
        return torch.compile(  # type: ignore[call-overload]  # the stub lacks some
            plain, backend=of, fullgraph=True, isolate_recompiles=True,
            recompile_limit=RECAPTURES,
        )  # fmt: skip

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs) if fsdp2.of(model) else evaluated(args, kwargs)
        if engine.roles is not None:
            engine.roles.armed = model.training
            if _compat.inside_ddp():
                raise RoleError(
                    "DistributedDataParallel averages gradients after blocks have used them",
                    advice=NO_DDP,
                )
        if engine.sharded is None:
            engine.sharded = fsdp2.of(model)
        shards = engine.sharded
        if shards is not None and engine.roles is not None:
            raise RoleError("blocks do not follow fully_shard", advice=NO_SHARDS)
        try:
            with shards.call(args, kwargs) if shards else nullcontext((args, kwargs)) as call_of:
                return streamed(engine, *call_of)
        except sharding.NotStreamedError:
            return plain(*args, **kwargs)
        except Exception as error:
            if not (engine.flags.try_again() or found(error, args, kwargs)):
                if shards is not None:
                    shards.reset()
                again = None if shards is not None else lambda: plain(*args, **kwargs)
                own = faults.of_call(error, model, again)
                if own is error:
                    raise
                cause = error if own.__cause__ is None else own.__cause__
                if isinstance(own, FxmemError):
                    own.original = cause
                # the many lines of Dynamo's help where fxmem itself fails
                raise own from (cause if isinstance(own, InternalError) else None)
        # outside the handler, so that an error of the next try has no other one behind it
        return call(*args, **kwargs)

    def streamed(of: Backend, args: Any, kwargs: Any) -> Any:
        settle(learning=False)  # of calls before this one, whose backward may change weights
        of.states = recorded_outputs.install(model, kwargs)
        with (
            _compat.capture_config(), answered(), _compat_hooks.gradient_hooks(),
            streamable(model), carried_kernels(model),
            uniform(args, kwargs) as (own, given), of.flags.shown(model), plain_head(),
        ):  # fmt: skip
            for leaf in _compat.tree_leaves((own, given)):
                if isinstance(leaf, Tensor):
                    _compat.mark_dynamic(leaf)

            def run() -> Any:
                key = _compat_hooks.unguarded(model), opaque.version
                return compiled(of, key)(*own, **given)

            return opaque.run(run, named(own, given))

    def found(error: Exception, args: Any, kwargs: Any) -> bool:
        """A part of the model runs as it is from now on, and the call may succeed."""
        alone = not engine.sharded and engine.roles is None
        return alone and opaque.found(error, lambda: plain(*args, **kwargs), named(args, kwargs))

    def evaluates(args: Any, kwargs: Any) -> Any:
        try:
            return streamed(idle, args, kwargs)
        except Exception as error:
            if not found(error, args, kwargs):
                raise
        return evaluates(args, kwargs)

    evaluated = Evaluation(model, stream, plain, evaluates)
    _compat.set_compiled_call(model, call)
    _TRANSFORMED[model] = engine


def _recorder(
    plan: Plan, told: set[str], roles: Callable[[], RoleSource | None] = lambda: None
) -> Recorder | None:
    """Records what is done with wide outputs, and runs it as the plan says."""
    if plan.stream is None or plan.stream.logits != "drop":
        return None

    def program(learns: bool) -> Backend:
        own = roles() if learns else None
        return Backend(plan, own, raises=True, one=True, idle=True, told=told)

    return Recorder(repr(plan), program, told=told)


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
    engine.flags.truth = True
    recorded = engine.recorder.programs.values() if engine.recorder else ()
    for backend in (engine, *(p.backend for p in recorded if p.backend.roles)):
        backend.roles = engine.roles
        for graph in backend.graphs:
            graph.roles = engine.roles


def is_transformed(model: nn.Module) -> bool:
    """Whether :func:`transform` was applied to the module itself and not undone."""
    return model in _TRANSFORMED


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that :func:`transform` changes."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inside: nn.Module = model.module
        return inside
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`transform`."""
    if unwrapped(model) is not model:
        restore(unwrapped(model))
        return model
    if model not in _TRANSFORMED:
        raise NotTransformedError(f"{type(model).__name__} was not transformed")
    carry.detach(model)
    detach(model)
    del _TRANSFORMED[model]
    return model
