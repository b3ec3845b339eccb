"""Predicted memory of one training step, without running it.

:func:`predict` replays what :class:`~fxmem.compiler.compile.CompiledGraph` and autograd do with
storages: what the preamble makes, what each region allocates (:mod:`fxmem.runtime.profile`),
what waits for the backward, and the gradients that stay. Parameters, inputs of the call and
gradients of earlier steps are not counted; parameters that are gathered for a region are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat.memory import StorageWatch
from fxmem.axes.sizes import evaluate
from fxmem.compiler.step import CompiledGraph
from fxmem.frontend.capture import canonical, value_of
from fxmem.frontend.late_outputs import Late
from fxmem.frontend.parameter_free import Leaf
from fxmem.memory.ledger import Ledger
from fxmem.memory.shards import Groups
from fxmem.runtime.offload import SMALLEST
from fxmem.runtime.profile import Output, Profile, body_bytes, inside_op, profile
from fxmem.runtime.region_call import RegionCall
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.retention import Kept

__all__ = [
    "Prediction", "Saved", "Step", "Use", "body_bytes", "has_loss", "predict", "predict_whole",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes of one step above what was there before.

    Attributes:
        peak_bytes: the most alive at any time.
        parameter_gradient_bytes: gradients alive after the step.
        saved_bytes: alive between forward and backward.
        transient_bytes: the most that one region takes while it runs.
        timeline: ``(label, bytes alive)``; a region's entry is its own peak.
    """

    peak_bytes: int
    parameter_gradient_bytes: int
    saved_bytes: int
    transient_bytes: int
    timeline: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Use:
    """How a region runs: code, sizes, rows per chunk, names of programs, and whether a backward
    comes.
    """

    code: RegionCode
    sizes: Mapping[str, int]
    chunk: int
    forward: str
    backward: str
    learns: bool


@dataclass(slots=True)
class Saved:
    """What one region keeps for its backward; ``away``: of this, what waits off the device."""

    call: RegionCall
    use: Use
    leaves: list[Any]
    away: list[tuple[Any, int]]
    gradients: list[tuple[Any, Output] | None] | None


def predict(graph: CompiledGraph, sizes: Mapping[str, int]) -> Prediction:
    """Memory of a step of ``graph`` at ``sizes``: symbol name -> int, such as ``{"T": 4096}``."""
    if graph.chunker.whole(sizes):
        return predict_whole(graph, sizes)
    kept = graph.expected(sizes)
    return predict_whole(graph, sizes) if kept.whole else Step(graph, sizes, kept).predict()


def has_loss(graph: CompiledGraph) -> bool:
    """The call makes one number to differentiate, and nothing that is made later."""
    outputs = graph.capture.outputs
    values = [value_of(o) for o in outputs if isinstance(o, fx.Node)]
    return any(map(_is_loss, values)) and not any(isinstance(o, Late) for o in outputs)


def predict_whole(graph: CompiledGraph, sizes: Mapping[str, int]) -> Prediction:
    """A call that runs as captured, under plain autograd, over fake tensors."""
    capture, watch = graph.capture, StorageWatch(inside_op)
    timeline: list[tuple[str, int]] = []
    with _compat.FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        given = [_fake(graph, value_of(n), sizes) for n in capture.inputs]
        watch.ignore(given)
        with watch:
            outputs = _compat_hooks.function(graph.plain)(*given)
            timeline.append(("forward", watch.peak))
            saved = watch.live
            loss = next((o for o in outputs if _is_loss(o)), None)
            if loss is not None:
                loss.backward()
        timeline.append(("backward", watch.peak))
        gradients = sum(g.nbytes for t in given if (g := getattr(t, "grad", None)) is not None)
    return Prediction(watch.peak, gradients, saved, watch.peak, timeline)


def _is_loss(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and not output.dim() and output.requires_grad


def _fake(graph: CompiledGraph, value: Any, sizes: Mapping[str, int]) -> Any:
    """A run-time input of a capture at the given sizes."""
    symbols = graph.capture.symbols
    if isinstance(value, torch.SymInt):
        known = value.node.expr.free_symbols <= symbols.keys()
        return evaluate(canonical(value, symbols), sizes) if known else 1  # nobody reads it
    if not isinstance(value, torch.Tensor):
        return value
    shape = [evaluate(canonical(s, symbols), sizes) for s in value.shape]
    return torch.empty(
        shape, dtype=value.dtype, device=value.device, requires_grad=value.requires_grad
    )


class Step:
    """Replays a step of a graph in a ledger of storages.

    ``kept``: what the regions keep, where it is not what the graph would. ``fresh``: no parameter
    has a gradient yet; to those that are there the new ones are added.
    """

    book: type[Ledger] = Ledger

    def __init__(
        self, graph: CompiledGraph, sizes: Mapping[str, int], kept: Kept | None = None,
        fresh: bool = True,
    ) -> None:  # fmt: skip
        self.graph, self.sizes, self.fresh = graph, dict(sizes), fresh
        self.kept = graph.expected(sizes) if kept is None else kept
        self.moving: list[Any] = []
        self.ledger = self.book()
        self.env: dict[Leaf, Any] = {}
        self.gradients: dict[Leaf, Any] = {}
        self.masks: set[tuple[Any, ...]] = set()
        self.groups = Groups(graph.chunker.shards, graph.calls, self.ledger)

    def predict(self) -> Prediction:
        saved = self.forward()
        between = self.ledger.live
        self._late()
        self.backward(saved)
        return Prediction(
            max((b for _, b in self.ledger.timeline), default=0), self.gradient_bytes(), between,
            self.ledger.transient, self.ledger.timeline,
        )  # fmt: skip

    def marks(self) -> list[tuple[int, int]]:
        """Position and bytes of every moment: region i of n runs forward at i, back at 2n-1-i."""
        self.predict()
        moments = zip(self.ledger.positions, self.ledger.timeline, strict=True)
        return [(position, alive) for position, (_, alive) in moments]

    def use(self, index: int) -> Use:
        call = self.graph.calls[index]
        code = call.code
        kind = "loss" if code.learns and code.early else "forward"
        level = self.kept.levels[index]
        held = f"+{level}" if level else ""
        rows = self.graph.chunker(call, self.sizes, shrink=self.kept.shrink)
        return Use(code, call.sizes(self.sizes), rows, kind + held, "backward" + held, code.learns)

    def forward(self) -> list[tuple[int, Saved]]:
        self.groups.begin()
        self._preamble()
        saved: list[tuple[int, Saved]] = []
        for index, call in enumerate(self.graph.calls):
            self.ledger.position = index
            self.groups.enter(index)
            use = self.use(index)
            run = profile(use.code, use.forward, use.sizes, use.chunk)
            self._masks(call, run)
            self.ledger.mark(f"forward {call.modules}", run.peak)
            values = self._results(("forward", index), run)
            count = len(use.code.joint.outputs)
            made = [v for v in values[:count] if v is not None]
            for leaf, (storage, _) in zip(call.outputs, made, strict=True):
                self.env[leaf] = storage
                self.ledger.hold(storage)
            if use.learns:
                rest = values[count:]
                gradients = rest if use.forward.startswith("loss") else None
                held = [v[0] for v in rest if v is not None] if gradients is None else []
                self._moved()
                saved.append((index, self._save(index, call, use, gradients, held)))
            self._drop(values)
            for leaf in call.release:
                if (gone := self.env.pop(leaf, None)) is not None:
                    self.ledger.release(gone)
            self.groups.leave(index)
        for leaf in [leaf for leaf in self.env if leaf[0] == "pre"]:
            self.ledger.release(self.env.pop(leaf))
        self._moved()
        self.groups.end_forward()
        self.ledger.mark("after forward")
        return saved

    def _late(self) -> None:
        """What is done with outputs that the call promised, and the gradients of what it reads."""
        late = self.graph.late_bytes(self.sizes, self.graph.late_working(self.sizes))
        if late is None:
            return
        self.ledger.position = len(self.graph.calls)
        made = {leaf: (size, 0) for leaf, size in late.states.items()}
        made |= {leaf: self.late_gradient(leaf, size) for leaf, size in late.weights.items()}
        for leaf, (stays, _) in made.items():
            if stays:
                self.gradients[leaf] = "late", leaf
                self.ledger.hold(("late", leaf), stays)
        self.ledger.mark("on promised outputs", late.working + sum(n for _, n in made.values()))

    def late_gradient(self, weight: Leaf, size: int) -> tuple[int, int]:
        """Bytes of a parameter's gradient that stay, and bytes that go at once."""
        return (size, 0) if self.fresh else (0, size)

    def _save(
        self, index: int, call: RegionCall, use: Use, gradients: list[Any] | None, held: list[Any]
    ) -> Saved:
        kept = use.code.saved(gradients is not None, use.backward.removeprefix("backward"))
        leaves = [
            self.env[leaf]
            for leaf, keep in zip(call.leaves, kept, strict=False)
            if keep and leaf in self.env
        ] + held
        away: list[tuple[Any, int]] = []
        if index in self.kept.away:
            named = {self.env[leaf] for leaf in call.leaves if leaf[0] == "main"} | set(held)
            own = {s: self.ledger.sizes[s] for s in leaves if s in named}
            away = [(s, size) for s, size in own.items() if size >= SMALLEST]
            leaves = [s for s in leaves if s not in dict(away)]
            self.moving = [s for s, _ in away]
        for storage in (*leaves, *self.moving):
            self.ledger.hold(storage)
        for gradient in gradients or []:
            if gradient is not None:
                self.ledger.hold(gradient[0])
        return Saved(call, use, leaves, away, gradients)

    def _moved(self) -> None:
        """What was on its way is away before more leaves."""
        for storage in self.moving:
            self.ledger.release(storage)
        self.moving = []

    def backward(self, saved: list[tuple[int, Saved]]) -> None:
        for at in reversed(range(len(saved))):
            index, entry = saved[at]
            self.ledger.position = 2 * len(self.graph.calls) - 1 - index
            self.groups.enter_backward(index)
            for _, due in saved[max(0, at - 1) : at + 1]:
                self._back(due)
            code = entry.use.code
            tangents = [
                self.gradients.pop(leaf, None)
                for leaf, d in zip(entry.call.outputs, code.differentiable, strict=True)
                if d
            ]
            gradients = entry.gradients or self.region(index, entry, tangents)
            self.take(index, entry, gradients)
            self._drop(gradients)
            back = [("back", s) for s, _ in entry.away]
            for storage in (*entry.leaves, *back, *(t for t in tangents if t is not None)):
                self.ledger.release(storage)
            self.groups.reduce(index, self.gradients)
        self.groups.end(self.gradients)
        self.ledger.position += 1
        self.ledger.mark("after backward")

    def _back(self, entry: Saved) -> None:
        """What waits elsewhere comes back for its region, once."""
        for storage, size in entry.away:
            if ("back", storage) not in self.ledger.holders:
                self.ledger.hold(("back", storage), size)

    def region(self, index: int, entry: Saved, tangents: list[Any]) -> list[Any]:
        """Run one region's backward; its gradients, each held once."""
        use = entry.use
        over = self._overwritten(entry, tangents) if tangents else {}
        begin = [*self._started(index, entry), *over]
        run = profile(use.code, use.backward, use.sizes, use.chunk, begin)
        self._masks(entry.call, run)
        self.ledger.mark(f"backward {entry.call.modules}", run.peak)
        return self._results(("backward", index), run, over)

    def take(self, index: int, entry: Saved, gradients: list[Any]) -> None:
        """Give a region's gradients to whom they belong."""
        for i, (leaf, gradient) in enumerate(zip(entry.call.leaves, gradients, strict=True)):
            if gradient is not None:
                storage, output = gradient
                self._accumulate(leaf, storage, output, i in entry.call.shared)

    def _started(self, index: int, entry: Saved) -> list[str]:
        """Accumulators that continue a gradient begun by a later region (tied weights)."""
        call, use = entry.call, entry.use
        program = use.code.program(use.backward)
        sums = {b.name: b.dtype for loop in program.loops for b in loop.allocate if b.zero}
        owned = [i for i, (leaf, last) in call.shared.items() if last and leaf in self.gradients]
        names = [(program.outputs[i], use.code.values[i].dtype) for i in owned]
        return [name for name, dtype in names if name is not None and sums.get(name) == dtype]

    def _overwritten(self, entry: Saved, tangents: list[Any]) -> dict[str, Any]:
        """Buffers that take a tangent's place, and its storage."""
        call = entry.call
        program = call.code.program(entry.use.backward)
        sole = [s for s, d in zip(call.sole, call.code.differentiable, strict=True) if d]
        names = call.code.tangents(program)
        free = {n: t for n, t, s in zip(names, tangents, sole, strict=False) if s and t is not None}
        return {b: free[name] for b, name in program.overwrites.items() if name in free}

    def _accumulate(self, leaf: Leaf, storage: Any, output: Output, shared: bool) -> None:
        """A first gradient of odd layout is copied; autograd adds a second one out of place."""
        if leaf in self.gradients:
            if not shared:
                self.ledger.mark(f"sum {leaf[1]}", output.bytes)
            return
        if leaf[0] == "input" and not self.fresh:  # added to the one that is there
            self.ledger.mark(f"sum {leaf[1]}", output.bytes)
            return
        if not output.contiguous and leaf[0] == "input":
            storage = ("copy", leaf)
        self.ledger.hold(storage, output.bytes)
        self.gradients[leaf] = storage
        self.ledger.mark(f"gradient {leaf[1]}")

    def gradient_bytes(self) -> int:
        """Bytes of the gradients of inputs, which stay."""
        storages = {s for leaf, s in self.gradients.items() if leaf[0] == "input"}
        return sum(self.ledger.sizes[s] for s in storages)

    def _results(
        self, owner: Any, run: Profile, given: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Hold every output once; :meth:`_drop` lets go again. ``given``: storages by buffer."""
        out: list[Any] = []
        for output, name in zip(run.outputs, run.names, strict=True):
            if output is None:
                out.append(None)
                continue
            storage = (given or {}).get(name or "", (owner, output.storage))
            self.ledger.hold(storage, output.bytes)
            out.append((storage, output))
        return out

    def _drop(self, results: list[Any]) -> None:
        for result in results:
            if result is not None:
                self.ledger.release(result[0])

    def _masks(self, call: RegionCall, run: Profile) -> None:
        """Masks are classified by the first region that uses them and kept until the step ends."""
        for mask in run.masks:
            key = (mask.key, *(call.leaves[i] for i in mask.inputs if 0 <= i < len(call.leaves)))
            if key not in self.masks:
                self.masks.add(key)
                self.ledger.mark("mask", mask.transient)
                self.ledger.hold(key, mask.kept)

    def _preamble(self) -> None:
        """Run the parameter-free part over fake tensors."""
        pre = self.graph.pre
        watch = StorageWatch()
        with _compat.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            given = [_fake(self.graph, value_of(n), self.sizes) for n in pre.inputs]
            watch.ignore(given)
            with watch:
                results = _compat_hooks.function(pre.module)(*given)
            self.ledger.mark("preamble", watch.peak)
            for name, value in zip(pre.outputs, results, strict=True):
                storage, size = watch.owner(value)
                self.env["pre", name] = ("pre", storage)
                self.ledger.hold(("pre", storage), size)
