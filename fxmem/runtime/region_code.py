"""The compiled form of one distinct region: its programs, built on first use and shared by equal
regions.

A region has up to four programs: the forward; the forward with gradients for a tangent of 1
(regions that end in a scalar loss); the backward for given tangents; and a second form of each for
attention masks that turn out not to be causal.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fxmem._compat import graph as _compat
from fxmem.axes.sizes import CHUNKS
from fxmem.errors import FxmemWarning
from fxmem.frontend import joint as joint_trace
from fxmem.frontend.faults import running
from fxmem.frontend.joint import Caller, Joint
from fxmem.frontend.regions import Region
from fxmem.frontend.subgraph import has_own_gradient
from fxmem.passes.keep_sum_dtype import KeepSumDtype
from fxmem.passes.reuse_tangents import ReuseTangents
from fxmem.program.steps import Barrier, Free, Program
from fxmem.progress import doing
from fxmem.rewriting.pipeline import Pass, run_passes
from fxmem.runtime.loops import accumulators, is_causal
from fxmem.runtime.saved_code import Saved
from fxmem.streaming.carried_states import with_states
from fxmem.streaming.chunk_size import footprint
from fxmem.streaming.emit import Emitter
from fxmem.streaming.exchanges import forms_of, given_as_rows
from fxmem.streaming.ignored_tokens import Packing, pack, packing, unpack
from fxmem.streaming.keep_levels import levels
from fxmem.streaming.loop_body import Handler
from fxmem.streaming.schedule import schedule
from fxmem.streaming.token_mixing import mixed

HALF_UNIT = 2.0**15
"""Tangent used instead of 1 where float16 values would underflow; divided out again afterwards."""


class Lowering(Protocol):
    """How the bodies of loops run."""

    def body_passes(self, device: torch.device) -> Sequence[Pass[torch.fx.Graph]]:
        """Rewrites of every finished body, in order."""

    def uses(self, kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a kernel that a program calls through something else may run."""

    @property
    def late(self) -> bool:
        """Programs compile at their first call, not when they are made."""

    def program_passes(self) -> Sequence[Pass[Program]]:
        """Rewrites of every finished program, after all others."""


class RegionCode:
    """Programs of a region; ``rewrite`` runs the joint passes, ``counter`` counts what is done,
    ``told`` has the operators that a warning of this capture has named.

    ``early``: the gradients of a scalar loss are taken in the forward and scaled in the backward,
    which a backward of the user's own need not allow.

    ``levels``: values that the backward can be given by the forward instead of making them again
    (:mod:`fxmem.streaming.keep_levels`); ``held`` is the first level, and ``hands_on`` says that it
    is only states that one chunk hands to the next.

    ``derived``: what other rooms made of this code and keep with it. ``only``: positions of the
    outputs that are differentiated, instead of all that can be.

    ``own``: which tensors come as this rank's rows of the sequence; None: no other rank has any.
    """

    def __init__(
        self, region: Region, caller: Callable[[], Caller], rewrite: Callable[[Joint], Joint],
        handlers: dict[str, Handler], run: Callable[..., list[Tensor | None]],
        counter: Any, name: str, lowering: Lowering, told: set[str],
        only: Sequence[int] | None = None, own: Sequence[bool] | None = None,
        saved: Saved | None = None,
    ) -> None:  # fmt: skip
        self.region, self.own = region, own
        self.name = name
        self._caller, self._rewrite, self._handlers, self._run = caller, rewrite, handlers, run
        self.counter, self.lowering = counter, lowering
        self.told, self.modules = told, region.modules
        self.values = list(region.values)
        self.needs_grad = region.needs_grad
        self.learns = any(self.needs_grad)
        out_values = [n.meta.get("example_value") for n in region.outputs]
        self.differentiable = [
            bool(self.learns and v.requires_grad) and (only is None or i in only)
            for i, v in enumerate(out_values)
        ]
        diff = [v for v, d in zip(out_values, self.differentiable, strict=True) if d]
        scalars = [i for i, v in enumerate(diff) if v.dim() == 0]
        self.loss = scalars[0] if scalars else -1
        self.is_loss = bool(scalars)
        self.early = self.is_loss and not has_own_gradient(region.nodes)
        self._given: dict[tuple[bool, ...], RegionCode] = {}
        self._packing: tuple[Packing | None] | None = None
        self.stored = saved or self._new(only)
        self.joint, self.held = self.stored.joint, self.stored.held
        self.footprint = footprint(self.joint)
        self.hands_on = bool(self.held) and all(
            self.joint.info[n].shape[:1] == (CHUNKS,) for n in self.held
        )
        self.programs: dict[tuple[str, bool], Program] = {}
        self.derived: dict[tuple[Any, ...], Any] = {}
        self.half = any(v.dtype == torch.float16 for v in self.values) and self.early

    @property
    def device(self) -> torch.device:
        """Where the region runs."""
        return next((v.device for v in self.values if v.dim()), torch.device("cpu"))

    @functools.cached_property
    def levels(self) -> list[list[torch.fx.Node]]:
        """What each level keeps; a loss takes its gradients in the forward and keeps nothing."""
        return levels(self.joint, self.held) if self.learns and not self.is_loss else [[]]

    def level(self, level: int) -> list[torch.fx.Node]:
        """What one level keeps; the first needs no others to be known."""
        return self.held if level == 1 else self.levels[level] if level else []

    @property
    def loss_joint(self) -> Joint:
        """The joint graph that differentiates the scalar loss alone."""
        return self.given([i == self.loss for i in range(sum(self.differentiable))]).joint

    def given(self, there: Sequence[bool]) -> RegionCode:
        """The code for a backward in which these of the differentiable outputs have a gradient.

        The others are no zeros, which would give parameters that feed only them a gradient and
        times an infinite derivative are not a number.
        """
        if all(there):
            return self
        if (key := tuple(there)) not in self._given:
            outputs = [i for i, d in enumerate(self.differentiable) if d]
            only = [i for i, t in zip(outputs, there, strict=True) if t]
            self._given[key] = RegionCode(
                self.region, self._caller, self._rewrite, self._handlers, self._run, self.counter,
                f"{self.name}_{''.join('01'[t] for t in there)}", self.lowering, self.told,
                only, self.own,
            )  # fmt: skip
        return self._given[key]

    def _new(self, only: Sequence[int] | None) -> Saved:
        joint = self._trace(only)
        lone = self.is_loss or not self.learns
        return Saved(joint, [] if lone else mixed(joint, ranks=self.own is not None))

    @_compat.no_autocast()
    def _trace(self, only: Sequence[int] | None) -> Joint:
        start = time.perf_counter()
        traced = self._rewrite(
            joint_trace.trace(self.region, self._caller(), backward=self.learns, only=only)
        )
        if self.own is None:
            with_states(traced)
        traced.forget_erased()
        self.counter.traces += 1
        self.counter.trace_seconds += time.perf_counter() - start
        return traced

    @_compat.no_autocast()
    def program(self, kind: str, causal: bool = True) -> Program:
        """The program of ``kind``: ``forward``, ``loss`` (with gradients) or ``backward``.

        ``backward:01w0`` (as for ``loss``) is the variant that makes the gradients of the inputs
        marked 1 or w alone, scheduled from the same trace; those marked w keep the precision of
        their sums. ``forward+2`` also makes the values of level 2, and ``backward+2`` takes them as
        further inputs instead of making them again.
        """
        key = (kind, causal)
        if key not in self.programs:
            start = time.perf_counter()
            label = f"{self.name}_{kind}".replace(":", "_").replace("+", "_held")
            if key not in self.stored.programs:
                doing(f"scheduling {self.name}, {kind}")
                self.stored.programs[key] = self._schedule(kind, causal, label)
                self.counter.programs += 1
            program = replace(self.stored.programs[key], name=label)
            program = run_passes(self.lowering.program_passes(), program, label)
            self.programs[key] = program
            self._warn(program)
            self.counter.lower_seconds += time.perf_counter() - start
        return self.programs[key]

    def _schedule(self, kind: str, causal: bool, label: str) -> Program:
        whole, _, mask = kind.partition(":")
        base, _, level = whole.partition("+")
        kept = self.level(int(level or 0))
        joint = self.loss_joint if base == "loss" else self.joint
        outputs, grads = joint.outputs, joint.grads
        if mask:
            grads = [None if m == "0" else g for g, m in zip(grads, mask, strict=True)]
        wanted = {
            "forward": [*outputs, *kept], "backward": grads, "loss": [*outputs, *grads],
        }[base]  # fmt: skip
        roots = list(dict.fromkeys(n for n in wanted if isinstance(n, torch.fx.Node)))
        held = kept if base == "backward" else []
        plan = schedule(joint, roots, causal=causal, held=held, ranks=self.own is not None)
        passes = self.lowering.body_passes(self.device)
        grads_at = {"forward": len(wanted), "backward": 0, "loss": len(outputs)}[base]
        forms = forms_of(wanted, grads_at, self.own)
        own = given_as_rows(joint, held, self.own)
        program = Emitter(plan, label, causal, self._handlers, passes, own).run(forms)
        rewrites: list[Pass[Program]] = [
            KeepSumDtype(name)
            for m, name in zip(reversed(mask), reversed(program.outputs), strict=False)
            if m == "w" and name is not None
        ]
        if base.startswith("backward"):
            rewrites.append(ReuseTangents(tuple(self.tangents(program))))
        return run_passes(rewrites, program, label)

    def has_compiled(self, kind: str) -> bool:
        """Some program of this kind has run, where bodies are compiled when they first run."""
        made = [p for (k, _), p in self.programs.items() if k == kind]
        return any(all(s.compiled and s.compiled.forms for s in p.loops) for p in made)

    def tangents(self, program: Program) -> list[str]:
        """Names of the program's inputs that are gradients of the region's outputs."""
        count = sum(t is not None for t in self.joint.tangents)
        return program.inputs[len(self.values) + 1 :][:count]

    def variant(self, wanted: Sequence[bool], sums: Collection[int] = ()) -> str:
        """Suffix of the programs that make these gradients alone; empty where that is all.

        ``sums``: input positions whose gradient keeps the precision of its sum, where that is
        another one.
        """
        every = [g is not None for g in self.joint.grads]
        mask = ["01"[w and e] for w, e in zip(wanted, every, strict=True)]
        for i in sums:
            if mask[i] == "1" and self.values[i].dtype.itemsize < 4:
                mask[i] = "w"
        return "" if mask == ["01"[e] for e in every] else ":" + "".join(mask)

    def _warn(self, program: Program) -> None:
        """Say once per operator of a capture what did not stream; ``explain`` has it in full."""
        for b in program.barriers:
            if not b.small and b.op not in self.told:
                self.told.add(b.op)
                where = b.module or b.source or "in its backward"
                text = f"{b.op} ({where}) runs whole, exact but not streamed"
                warnings.warn(f"{text}; fxmem.explain lists all", FxmemWarning, stacklevel=2)

    @_compat.no_autocast()  # casts are ops of the program
    def _execute(
        self,
        kind: str,
        state: Any,
        chunk: int,
        tensors: Sequence[Tensor | None],
        begin: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:
        with running(f"the {kind.partition(':')[0]} of {self.name}", self.modules):
            program = self.choose(kind, state, chunk, tensors)
            return self._run(program, state, tensors, chunk, self.counter, begin or {})

    def choose(
        self, kind: str, state: Any, chunk: int, tensors: Sequence[Tensor | None]
    ) -> Program:
        """The program of ``kind`` that is right for the attention masks of these inputs."""
        program = self.program(kind)
        if self.own is None and program.masks and not is_causal(program, state, chunk, tensors):
            return self.program(kind, causal=False)
        return program

    def forward(
        self, state: Any, chunk: int, tensors: Sequence[Tensor], seed: Tensor | None, *,
        learn: bool, variant: str = "",
    ) -> tuple[list[Tensor], list[Tensor | None] | None]:  # fmt: skip
        """Outputs, and gradients for tangent 1 where ``learn`` is set and they are ``early``."""
        if not (learn and self.early):
            given = [*tensors, seed, *(None for t in self.joint.tangents if t is not None)]
            return [t for t in self._execute("forward", state, chunk, given) if t is not None], None
        joint = self.loss_joint
        (node,) = (t for t in joint.tangents if t is not None)
        unit = torch.full((), self._unit, dtype=joint.info[node].dtype, device=tensors[0].device)
        results = self._loss(state, chunk, tensors, seed, unit, variant)
        k = len(joint.outputs)
        return [t for t in results[:k] if t is not None], list(results[k:])

    def forward_held(
        self, state: Any, chunk: int, tensors: Sequence[Tensor], seed: Tensor | None, level: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the values of a level for :meth:`backward`."""
        given = [*tensors, seed, *(None for t in self.joint.tangents if t is not None)]
        kind = f"forward+{level}"
        results = [t for t in self._execute(kind, state, chunk, given) if t is not None]
        count = len(results) - len(self.level(level))
        return results[:count], results[count:]

    def _loss(
        self, state: Any, chunk: int, tensors: Sequence[Tensor], seed: Tensor | None, unit: Tensor,
        variant: str,
    ) -> list[Tensor | None]:  # fmt: skip
        """The loss program, on the valid tokens alone where ignored ones cannot matter."""
        if self._packing is None:  # whose rows would stand on other ranks than the states
            self._packing = (packing(self.loss_joint) if self.own is None else None,)
        plan = self._packing[0]
        packed = pack(plan, tensors) if plan is not None else None
        if plan is None or packed is None:
            return self._execute("loss" + variant, state, chunk, [*tensors, seed, unit])
        chosen, rows = packed
        sizes = {**state.sizes, **dict.fromkeys(plan.batch, 1), "T": rows.numel()}
        tokens = chunk * self.footprint.batch(state.sizes)
        own = type(state)(sizes)
        results = self._execute("loss" + variant, own, tokens, [*chosen, seed, unit])
        likes = [*(None for _ in self.loss_joint.outputs), *tensors]
        return [
            unpack(r, rows, like) if carries and r is not None and like is not None else r
            for r, carries, like in zip(results, plan.outputs, likes, strict=True)
        ]

    @property
    def _unit(self) -> float:
        return HALF_UNIT if self.half else 1.0

    def draw_seed(self, device: torch.device) -> Tensor | None:
        """The dropout seed of one forward, from torch's default generator."""
        return torch.randint(2**31, ()).to(device) if self.joint.random else None

    def backward(
        self,
        state: Any,
        chunk: int,
        saved: Sequence[Tensor | None],
        seed: Tensor | None,
        tangents: Sequence[Tensor],
        start: dict[int, Tensor] | None = None,
        variant: str = "",
        free: Sequence[bool] = (),
        held: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Gradients of the inputs that want one, ``None`` for the others.

        ``start``: by input position, a gradient to add this one to (in place where it can be).
        ``free``: which tangents nobody reads afterwards, so that a result may take their place.
        ``held``: what :meth:`forward_held` gave, at the level that ``variant`` names.
        """
        given = [*saved, seed, *tangents, *held]
        begin: dict[str, Tensor] = {}
        if start or any(free):
            program = self.choose("backward" + variant, state, chunk, given)
            # what is there already is a sum over ranks, which the rest becomes at its end
            begin = accumulators(program, start or {}) if self.own is None else {}
            open_ = {
                name: tangent
                for name, tangent, f in zip(self.tangents(program), tangents, free, strict=False)
                if f and tangent.is_contiguous()
            }
            begin |= {b: open_[name] for b, name in program.overwrites.items() if name in open_}
        grads = self._execute("backward" + variant, state, chunk, given, begin)
        for i, part in (start or {}).items():
            own = grads[i]
            if own is not part:
                grads[i] = part if own is None else part.add_(own)
        return grads

    def scale(self, grads: list[Tensor | None], tangent: Tensor) -> list[Tensor | None]:
        """Stored gradients times the tangent, in place where the storage is theirs alone."""
        factor = tangent / self._unit
        if tangent.device.type == "cpu" and float(factor) == 1.0:
            return grads
        done = {id(g): g for g in grads if g is not None}
        users = Counter(g.untyped_storage().data_ptr() for g in done.values())
        for key, g in done.items():
            storage = g.untyped_storage()
            own = users[storage.data_ptr()] == 1 and storage.nbytes() == g.numel() * g.itemsize
            done[key] = g.mul_(factor.to(g.dtype)) if own else g * factor.to(g.dtype)
        return [None if g is None else done[id(g)] for g in grads]

    def saved(self, has_grads: bool, variant: str = "") -> list[bool]:
        """Which inputs the backward reads."""
        program = self.program("backward" + variant)
        used = {t for s in program.steps if not isinstance(s, Free) for t in s.tensors}
        used |= {t for m in program.masks for t in m.tensors}
        used |= set(filter(None, program.outputs))
        names = program.inputs[: len(self.values)]
        return [n in used for n in names]

    @property
    def barriers(self) -> list[Barrier]:
        codes = [self, *self._given.values()]
        return [b for code in codes for p in code.programs.values() for b in p.barriers]
