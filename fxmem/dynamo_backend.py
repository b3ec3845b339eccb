"""The Dynamo backend: what becomes of each captured graph, and the entry points of
``torch.compile``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat import errors as _compat_errors
from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat import tracing, varying
from fxmem._compat.capture_stack import sources
from fxmem._compat.fixed_sizes import keep_symbolic
from fxmem.compiler.compile import LAYER_PASSES, compile_graph
from fxmem.compiler.step import CompiledGraph
from fxmem.deferred.recorder import Recorder
from fxmem.distributed.fsdp2 import ShardedModel
from fxmem.distributed.sequence import Group
from fxmem.errors import (
    CaptureError,
    FxmemError,
    FxmemWarning,
    PlanError,
)
from fxmem.frontend import faults
from fxmem.frontend.capture import has_varying_size
from fxmem.frontend.flags import Flags
from fxmem.frontend.in_parts import InParts
from fxmem.frontend.opaque import Opaque
from fxmem.memory.budget import Budget
from fxmem.memory.late import LateWorking
from fxmem.passes.inline_bodies import inline_layers
from fxmem.plan.plan import Plan, Stream, check_names
from fxmem.roles.roles import RoleSource
from fxmem.roles.terms import Uncaptured
from fxmem.runtime import sharding


class Backend:
    """A Dynamo backend for one plan; ``graphs`` are the captures it has compiled.

    ``raises``: errors leave through Dynamo, which then keeps no capture: the next call tries again.
    ``recorder``: takes wide outputs that are not computed in the call. ``one``: a capture is one
    region. ``idle``: calls without gradients stream too. ``told``: operators and calls that a
    warning has named. ``states``: states of the model that leave a call are wanted; they are no
    cache that nobody asked for. ``uncaptured``: runs calls without gradients that are not captured.
    ``in_parts``: a capture is a part of a model, so that one without a length says nothing.
    ``divides``: where one graph cannot be captured, it may be so.
    """

    divides = True

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
        self.uncaptured: Uncaptured | None = None
        self.sharded: ShardedModel | None = None
        self.group: Group | None = None
        self.states = self.in_parts = False
        self.parts = InParts()
        self.opaque: Callable[[], Opaque | None] = lambda: None

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        try:
            if (opaque := self.opaque()) is not None:
                opaque.check(sources())
            last = not tracing.ends_early(gm)
            gm = inline_layers(gm, LAYER_PASSES)
            if not self.flags.captured(watched=any(map(_compat_hooks.is_hook, gm.graph.nodes))):
                raise CaptureError("the capture depends on which parameters require a gradient")
            # values of a trace are nothing that a checkpoint or an offload of the caller's saves
            with tracing.nothing_saved(), keep_symbolic(set()):
                return self.flags.run(self._compile(gm, example_inputs, last))
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

    def _compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], last: bool
    ) -> Callable[..., Any]:
        learns = torch.is_grad_enabled() and any(
            isinstance(v, Tensor) and v.requires_grad for v in example_inputs
        )
        if not (learns or self.idle) or (self.plan.stream is None and self.roles is None):
            return _unstreamed(gm)
        if varying.mark_inputs(gm, example_inputs):
            tracing.restart_capture("fxmem streams a symbolic length")
        if not has_varying_size(gm) and self.roles is None and self.in_parts:
            return _unstreamed(gm)
        if not has_varying_size(gm):
            warnings.warn(_not_streamed(), FxmemWarning, stacklevel=2)
            if self.roles is None:
                return _unstreamed(gm)
        late = None if self.recorder is None else self.recorder.output
        graph = compile_graph(
            gm, example_inputs, self.plan, self.roles, late=late, one=self.one, states=self.states,
            learns=learns, told=self.told, group=self.group, last=last,
        )  # fmt: skip
        if (recorder := self.recorder) is not None:
            graph.late_working = LateWorking(graph, recorder.graphs)
        stream = self.plan.stream
        if stream is not None and (stream.memory, stream.offload) != ("least", "none"):
            graph.holding = Budget(graph, stream)
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


def _not_streamed() -> str:
    return (
        "no input has a length that may vary, so nothing is streamed: the model fixes its sizes "
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
    if plan.stream is not None and plan.stream.sequence is not None:
        raise PlanError(
            "a torch.compile backend knows no mesh, which Stream.sequence needs",
            advice="use fxmem.transform(model, plan, mesh=mesh)",
        )
    told: set[str] = set()
    return Backend(plan, recorder=recorder_of(plan, told), idle=True, told=told)


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


def recorder_of(
    plan: Plan, told: set[str], roles: Callable[[], RoleSource | None] = lambda: None
) -> Recorder | None:
    """Records what is done with wide outputs, and runs it as the plan says."""
    if plan.stream is None or plan.stream.logits != "drop":
        return None

    def program(learns: bool) -> Backend:
        own = roles()
        if own is not None and not learns:
            own = own.reading
        return Backend(plan, own, raises=True, one=True, idle=True, told=told)

    return Recorder(repr(plan), program, told=told)


__all__ = ["Backend", "backend", "fxmem_backend", "recorder_of"]
