"""The public calls: ``transform``, ``restore`` and their kin."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import ddp, recorded_outputs
from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat.dynamo_gaps import answered
from fxmem._compat.other_compilers import by_itself
from fxmem._compat.repeated_layers import Sharing, sharing
from fxmem._compat.tracing import inside_transform, on_capture
from fxmem._compat.trl import plain_head
from fxmem._compat.varying import mark_dynamic
from fxmem.blocks import adapters
from fxmem.blocks.attach import attach, detach, state_of
from fxmem.blocks.state import BlockState
from fxmem.compiler.evaluation import Evaluation
from fxmem.compiler.training_step import check_called
from fxmem.deferred.tensor import settle, with_values
from fxmem.distributed import fsdp2
from fxmem.distributed.sequence import Group, digest
from fxmem.distributed.whole import unwrapped
from fxmem.dynamo_backend import Backend, backend, fxmem_backend, recorder_of
from fxmem.errors import (
    FxmemError,
    FxmemWarning,
    InternalError,
    NotTransformedError,
    PlanError,
    RoleError,
)
from fxmem.frontend import faults
from fxmem.frontend.attributes import Counters
from fxmem.frontend.collector import resting
from fxmem.frontend.experts import streamable
from fxmem.frontend.in_parts import InParts
from fxmem.frontend.inputs import makes_cache, named, uniform, without_cache
from fxmem.frontend.layer_kinds import layer_kinds
from fxmem.frontend.opaque import Opaque
from fxmem.frontend.recurrences import carried_kernels
from fxmem.plan import carry
from fxmem.plan.plan import Plan, Stream
from fxmem.progress import reported
from fxmem.prune.shrink.materialize import materialize
from fxmem.roles.roles import Adapter, ReadOnly, RoleSource, RoleTable
from fxmem.roles.terms import Uncaptured, leave
from fxmem.runtime import sharding

_BY_FUNCTION = "a transform of torch.func, or forward-mode differentiation"
RECAPTURES = 64
"""Captures per model (train and eval, with and without a mask, autocast states) before an error."""

_TRANSFORMED: weakref.WeakKeyDictionary[nn.Module, Backend] = weakref.WeakKeyDictionary()


def transform(model: nn.Module, plan: Plan | None = None, *, mesh: Any = None) -> nn.Module:
    """Make training steps of ``model`` follow ``plan`` (default: streaming with automatic chunks);
    returns the same module, changed in place.

    Class, parameters, ``state_dict``, ``save_pretrained`` and ``generate`` stay as they are. Calls
    without gradients stream too, but for decoding and small ones. Deep copies and pickles
    follow the plan as well, except for ``plan.blocks``. With ``plan.prune`` the result is a new,
    smaller model and the given one stays as it is. Of a DistributedDataParallel the model inside is
    transformed; parameters that ``fully_shard`` has spread, before or after, stay where they are.
    ``mesh``: the ``torch.distributed.DeviceMesh`` with the dimension of ``Stream(sequence=...)``.

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
    group = _group(plan, mesh)
    if unwrapped(model) is not model:
        transform(unwrapped(model), plan, mesh=mesh)
        return model
    if isinstance(model, nn.DataParallel):
        raise PlanError(
            "the model is wrapped by DataParallel, which copies it at every call",
            advice="transform the model itself, and run one process for each device: wrap it by "
            "DistributedDataParallel",
        )
    check_called(model)
    leave(model)
    state = BlockState(model, plan.blocks) if plan.blocks is not None else None
    install(model, plan).group = group
    carry.attach(model, plan, install, group)
    detach(model)
    if state is not None:
        attach(model, state)
        use_roles(
            model, state.table, state.follow, state.adapters_of_all if state.adapters else None,
            state.inside,
        )  # fmt: skip
    return model


def _group(plan: Plan, mesh: Any) -> Group | None:
    name = None if plan.stream is None else plan.stream.sequence
    if name is not None:
        return Group.of(mesh, name)
    if mesh is not None:
        raise PlanError(
            "mesh is given, and the plan names none of its dimensions",
            advice="name the one that a sequence is to be divided over: Stream(sequence=...)",
        )
    return None


def install(model: nn.Module, plan: Plan, kind: type[Backend] = Backend) -> Backend:
    """Replace the call of ``model``, which may still be without its attributes; what has captured
    it is of the class ``kind``.
    """
    stream = plan.stream
    told: set[str] = set()
    # weak: what a Backend has compiled must go with the model, not with a later collection
    recorder = recorder_of(plan, told, lambda: getattr(this(), "roles", None))
    engine = kind(plan, raises=True, recorder=recorder, told=told)
    this, opaque, counters = weakref.ref(engine), Opaque(model), Counters(model)
    parts = engine.parts = InParts(type(model).__name__)
    # a capture without gradients has nothing to share with one that learns
    idle = Backend(plan, raises=True, recorder=recorder, idle=True, told=told)
    engine.opaque = idle.opaque = weakref.ref(opaque)
    plain = _compat.call_impl(model)

    layers = Sharing(lambda: {} if engine.sharded else layer_kinds(model))

    @functools.cache
    def compiled(of: Backend, _: Hashable, one: bool) -> Callable[..., Any]:
        return torch.compile(  # type: ignore[call-overload]  # the stub lacks some
            plain, backend=of, fullgraph=one, isolate_recompiles=True,
            recompile_limit=RECAPTURES,
        )  # fmt: skip

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_values((args, kwargs), type(model).__name__)
        if inside_transform():
            return transformed(args, kwargs)
        if not torch.is_grad_enabled():
            idle.roles = None if engine.roles is None else engine.roles.reading
            return whole(*args, **kwargs) if fsdp2.of(model) else evaluated(args, kwargs)
        if model.training:
            kwargs = without_cache(model, kwargs, args)
        if engine.roles is not None:
            engine.roles.armed = model.training
            engine.roles.inside(ddp.active())
        if engine.sharded is None:
            engine.sharded = fsdp2.of(model)
        shards = engine.sharded
        if shards is not None and engine.roles is not None:
            engine.roles.follow()
            engine.roles.shard = shards.shard
            if engine.roles.reading is not None:
                engine.roles.reading.shard = shards.shard
        try:
            facts = functools.partial(_facts, model, plan)
            shown = shards.call(args, kwargs, facts) if shards else nullcontext((args, kwargs))
            with shown as call_of:
                return streamed(engine, *call_of)
        except sharding.NotStreamedError:
            return plain(*args, **kwargs)
        except Exception as error:
            if not (engine.flags.try_again() or found(error, args, kwargs)):
                if shards is not None:
                    shards.reset()
                again = None if shards is not None else lambda: plain(*args, **kwargs)
                named_ = faults.of_call(error, model, again)
                if not in_parts(error, named_):
                    own = parts.failed(error, named_)
                    if not after_all(own, args, kwargs):
                        if own is error:
                            raise
                        cause = error if own.__cause__ is None else own.__cause__
                        if isinstance(own, FxmemError):
                            own.original = cause
                        # the many lines of Dynamo's help where fxmem itself fails
                        raise own from (cause if isinstance(own, InternalError) else None)
        # outside the handler, so that an error of the next try has no other one behind it
        parts.take_back()
        return call(*args, **kwargs)

    def transformed(args: Any, kwargs: Any) -> Any:
        """Regions have gradients, and no other derivatives."""
        if torch.is_grad_enabled() and _BY_FUNCTION not in told:
            told.add(_BY_FUNCTION)
            warnings.warn(
                f"{type(model).__name__} runs as plain PyTorch inside {_BY_FUNCTION}", FxmemWarning,
                stacklevel=3,
            )  # fmt: skip
        return whole(*args, **kwargs)

    def streamed(of: Backend, args: Any, kwargs: Any) -> Any:
        settle(learning=False)  # of calls before this one, whose backward may change weights
        asked = recorded_outputs.install(model, kwargs)
        of.states = asked or not makes_cache(model, kwargs, args)
        of.in_parts, of.flags.truth = parts.now, of.flags.truth or parts.now
        with (
            _compat.capture_config(), answered(), _compat_hooks.gradient_hooks(),
            _compat_hooks.without_asking(model, but=int(parts.now)),
            streamable(model), carried_kernels(model),
            uniform(args, kwargs) as (own, given), of.flags.shown(model), plain_head(),
            reported(on_capture), resting(on_capture), counters.shown(on_capture),
            _compat_hooks.own_hooks_uncaptured(model),
        ):  # fmt: skip
            for leaf in _compat.tree_leaves((own, given)):
                if isinstance(leaf, Tensor):
                    mark_dynamic(leaf)

            def run() -> Any:
                key = _compat_hooks.unguarded(model), opaque.version
                if parts.now:
                    return compiled(of, key, False)(*own, **given)
                try:
                    with sharing(layers) as shared:
                        return compiled(of, key, True)(*own, **given)
                except Exception as error:
                    if not shared(error):
                        raise
                return compiled(of, key, True)(*own, **given)

            tensors = named(own, given)
            parts.begin(model, tensors.values())
            result = opaque.run(run, tensors, parts.take_back)
        parts.ran()
        return result

    def alone() -> bool:
        return not engine.sharded and engine.roles is None and engine.group is None

    def divides() -> bool:
        """The model may be captured in parts. No budget holds for several graphs."""
        budget = stream is not None and stream.memory != "least"
        return engine.divides and alone() and not budget

    def in_parts(error: Exception, named_: Exception) -> bool:
        """The model is captured in parts from now on, and the call may succeed."""
        return divides() and parts.found(error, named_)

    def found(error: Exception, args: Any, kwargs: Any) -> bool:
        """A part of the model runs as it is from now on, and the call may succeed."""
        most = not (divides() and parts.possible)
        return alone() and opaque.found(
            error, lambda: plain(*args, **kwargs), named(args, kwargs), most
        )

    def after_all(own: Exception, args: Any, kwargs: Any) -> bool:
        """It cannot be captured in parts either, and what holds most of it runs as it is."""
        cause, parts.cause = parts.cause, None
        return own is parts.error and cause is not None and found(cause, args, kwargs)

    def evaluates(args: Any, kwargs: Any) -> Any:
        try:
            return streamed(idle, args, kwargs)
        except Exception as error:
            own = faults.of_call(error, model, None)
            may = found(error, args, kwargs) or in_parts(error, own)
            if not may and not after_all(parts.failed(error, own), args, kwargs):
                raise
        parts.take_back()
        return evaluates(args, kwargs)

    def whole(*args: Any, **kwargs: Any) -> Any:
        terms = engine.uncaptured
        return plain(*args, **kwargs) if terms is None else terms(plain, *args, **kwargs)

    evaluated = Evaluation(model, stream, whole, evaluates)
    _compat.set_compiled_call(model, by_itself(call))
    _TRANSFORMED[model] = engine
    return engine


def _facts(model: nn.Module, plan: Plan) -> dict[str, int]:
    """On what it depends which gradients are reduced, in numbers that ranks compare."""
    return {
        "plans": digest(plan.blocks, plan.stream and plan.stream.sequence),
        "parameters that learn": digest(
            [n for n, p in model.named_parameters() if p.requires_grad]
        ),
        "numbers of steps": 0 if plan.blocks is None else state_of(model).step,
    }


def merge_low_rank(model: nn.Module) -> int:
    """Add the low-rank terms of ``Blocks(inactive=LowRank(...))`` to their weights, once, at the
    end of training; in float32 or wider, then rounded to the weights' precision.

    Returns:
        The number of weights that changed.

    Raises:
        NotTransformedError: the model has no block state.
    """
    model = unwrapped(model)
    return adapters.merge(model, state_of(model).adapters)


def use_roles(
    model: nn.Module,
    table: Callable[[], RoleTable | None],
    follow: Callable[[], None] = lambda: None,
    adapters: Callable[[], Mapping[nn.Parameter, Adapter]] | None = None,
    inside: Callable[[Any], None] | None = None,
) -> None:
    """Let the training steps of a transformed model follow a role table, read at every forward.
    ``follow`` is told before a call of a model whose parameters are shards. ``adapters``: of all
    weights that have one, read at every call without gradients. ``inside`` is told before a call in
    which DistributedDataParallel it is, or None; without it the model is refused in one.

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
    reading = None
    if adapters is not None:
        reading = RoleSource(lambda: ReadOnly(adapters=adapters()), armed=False)
        this = weakref.ref(model)
        engine.uncaptured = Uncaptured(lambda: _as_read(this(), follow, adapters))
        engine.uncaptured.reach(model, adapters())
    old, engine.roles = (
        engine.roles,
        RoleSource(table, model.training, follow, inside or _not_inside, reading=reading),
    )
    engine.flags.truth = True
    recorded = engine.recorder.programs.values() if engine.recorder else ()
    for one in (engine, *(p.backend for p in recorded if p.backend.roles)):
        one.roles = engine.roles if one is engine or one.roles is old else reading
        for graph in one.graphs:
            graph.roles = one.roles


def _not_inside(wrapper: Any) -> None:
    if wrapper is not None:
        raise RoleError(
            "DistributedDataParallel averages gradients after roles have used them",
            advice="give the model itself, one process each, and average in the table's update",
        )


def _as_read(
    model: nn.Module | None, follow: Callable[[], None],
    adapters: Callable[[], Mapping[nn.Parameter, Adapter]],
) -> Mapping[nn.Parameter, Adapter]:  # fmt: skip
    """By what plain PyTorch reads: under FSDP2 by whole parameters."""
    if model is None or (shards := fsdp2.of(model)) is None:
        return adapters()
    follow()
    found = adapters()
    return {whole: found[shard] for whole, shard in shards.whole() if shard in found}


def is_transformed(model: nn.Module) -> bool:
    """Whether :func:`transform` was applied to the module itself and not undone."""
    return model in _TRANSFORMED


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`transform`."""
    if unwrapped(model) is not model:
        restore(unwrapped(model))
        return model
    if model not in _TRANSFORMED:
        raise NotTransformedError(f"{type(model).__name__} was not transformed")
    carry.detach(model)
    leave(model)
    detach(model)
    del _TRANSFORMED[model]
    return model


__all__ = [
    "Backend", "backend", "fxmem_backend", "install", "is_transformed", "merge_low_rank", "restore",
    "transform", "unwrapped", "use_roles",
]  # fmt: skip
