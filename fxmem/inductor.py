"""Chunk bodies through Inductor: each is compiled once, for every chunk and every length.

The body's segments (:mod:`fxmem.passes.segments`) are compiled with symbolic sizes; the loop itself
is never given to the compiler, which would fuse its chunks back together. Sizes are found by
running the body on fake tensors whose lengths are symbols: ``rows`` of the chunk, ``lo``, ``T``,
the batch. What Inductor assumed about them is checked at every call, and where it does not hold the
segment runs as it stands.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, fx

from fxmem import _compat_inductor, runtime
from fxmem._compat_inductor import Symbolic
from fxmem.kernels import attention, dropout, token_nll
from fxmem.passes.segments import Segment, segments
from fxmem.program import Loop, Program
from fxmem.sizes import Size

_TYPICAL = {"T": 8192, "lo": 3584, "rows": 512}
Compiled = Callable[[list[Any]], Sequence[Tensor]]


@dataclass(slots=True)
class CompileStats:
    """What Inductor was asked for in this process: bodies, segments, those that were cached."""

    bodies: int = 0
    segments: int = 0
    cached: int = 0
    eager_calls: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)


STATS = CompileStats()


def attach(program: Program) -> None:
    """Let the loops of a program run compiled; they are compiled at their first call."""
    for i, loop in enumerate(program.loops):
        loop.compiled = CompiledBody(f"{program.name} loop {i}", loop, program)


class CompiledBody:
    """A loop's body; :meth:`bind` gives what runs for these tensors."""

    def __init__(self, label: str, loop: Loop, program: Program) -> None:
        self.label, self.loop = label, loop
        self.shapes = [program.shapes[t][0] for t in loop.tensors]
        self.forms: dict[tuple[Any, ...], Callable[..., None]] = {}

    def bind(self, tensors: Sequence[Tensor]) -> Callable[..., None]:
        """The compiled body for tensors of these types and layouts, not sizes."""
        layouts = [layout(t) for t in tensors]
        key = tuple((t.dtype, t.device, how) for t, how in zip(tensors, layouts, strict=True))
        if key not in self.forms:
            self.forms[key] = self._compile(tensors, layouts)
        return self.forms[key]

    def _compile(self, tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> Callable[..., None]:
        start = time.perf_counter()
        graph = self.loop.module.graph
        try:
            values, sizes = propagate(self.loop, self.shapes, tensors, layouts)
            parts = segments(graph)
            made = [p for p in parts if isinstance(p, Segment) and p.gains]
            with _progress(self.label, len(made)) as advance:
                new = _join(self.loop.module, parts, values, sizes, advance)
        except Exception as error:  # what is not compiled runs as it stands, exact
            STATS.failed[self.label] = f"{type(error).__name__}: {error}".split("\n")[0]
            return self.loop.module
        STATS.bodies += 1
        STATS.seconds += time.perf_counter() - start
        return new


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of the dimensions in memory where they are dense, else the strides."""

    order: tuple[int, ...] = ()
    strides: tuple[int, ...] | None = None


def layout(x: Tensor) -> Layout:
    """How ``x`` lies in memory, without its sizes."""
    plain = tuple(range(x.dim()))
    if x.is_contiguous():
        return Layout(plain)
    order = tuple(sorted(plain, key=x.stride, reverse=True))
    return Layout(order) if x.permute(order).is_contiguous() else Layout(strides=x.stride())


def strides(shape: Sequence[Size], how: Layout) -> list[Size]:
    """Strides of a tensor of ``shape`` that lies so."""
    if how.strides is not None:
        return [sympy.Integer(s) for s in how.strides]
    out: list[Size] = [sympy.Integer(1)] * len(shape)
    step: Size = sympy.Integer(1)
    for d in reversed(how.order):
        out[d] = step
        step = step * shape[d]
    return out


def propagate(
    loop: Loop, shapes: Sequence[Sequence[Size]], tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
) -> tuple[dict[fx.Node, Any], Symbolic]:  # fmt: skip
    """Every value of the body on fake tensors with symbolic sizes."""
    hints = {name: _TYPICAL.get(name, 2 + i) for i, name in enumerate(loop.ints)}
    sizes = Symbolic.of({**hints, "lo": _TYPICAL["lo"], "rows": _TYPICAL["rows"]})
    given: dict[str, Any] = {**sizes.ints, "hi": sizes.ints["lo"] + sizes.ints["rows"]}
    for name, shape, x, how in zip(loop.tensors, shapes, tensors, layouts, strict=True):
        given[name] = sizes.tensor(shape, strides(shape, how), x.dtype, x.device)
    env: dict[fx.Node, Any] = {}
    with sizes.running():
        for node in loop.module.graph.nodes:
            if node.op == "placeholder":
                env[node] = given.get(node.target)
            elif node.op == "get_attr":
                env[node] = sizes.mode.from_tensor(getattr(loop.module, node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = _fake(node, args, kwargs, sizes)
    return env, sizes


def _fake(node: fx.Node, args: Any, kwargs: Any, sizes: Symbolic) -> Any:
    if node.target is runtime.clamp:
        # which of its operands a clamped row number equals differs from chunk to chunk
        return sizes.symbol(node.name, 300 + len(sizes.ints))
    rule = _FAKES.get(node.target)
    return rule(*args, **kwargs) if rule is not None else node.target(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, h, c, _e = q.shape
    out = q.new_empty((b, c, h, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((b, h, c), dtype=torch.promote_types(q.dtype, torch.float32))


def _nothing(*_: Any) -> None:
    return None


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] + before + after
    return x.new_empty(shape)


_FAKES: dict[Any, Callable[..., Any]] = {
    attention.forward: _attention,
    attention.backward: lambda dout, q, *_: q.new_empty(q.shape),
    attention.causal_spans: _nothing,
    attention.full_spans: _nothing,
    attention.explicit_spans: _nothing,
    token_nll.forward_: lambda x, *_: (x.new_empty(x.shape[:1]), x.new_empty(x.shape[:1])),
    token_nll.backward_: lambda grad, x, *_: x.new_empty(x.shape),
    token_nll.backward: lambda grad, x, *_: x.new_empty(x.shape),
    runtime.pad_rows: _padded,
    dropout.chunk: lambda x, *_: x.new_empty(x.shape),
    **dict.fromkeys(
        (
            runtime.put, runtime.add, runtime.add_mm, runtime.add_bmm, runtime.add_embedding,
            runtime.add_expert_weight,
        ),
        _nothing,
    ),
}  # fmt: skip
"""Results of functions that are not run on fake tensors; their real results are laid out alike by
:func:`fxmem.runtime.laid_out`.
"""


class SegmentCall(torch.nn.Module):
    """A compiled segment: takes the list of its sizes and tensors, and empties it."""

    def __init__(self, segment: Segment, values: Mapping[fx.Node, Any], outer: Symbolic) -> None:
        super().__init__()
        self._nodes, self._outputs = segment.nodes, segment.outputs
        self.tensors = [n for n in segment.inputs if isinstance(values[n], Tensor)]
        self._sizes = {n: outer.expr(values[n]) for n in segment.inputs if n not in self.tensors}
        metas = [
            (
                [outer.expr(s) for s in values[n].shape],
                [outer.expr(s) for s in values[n].stride()],
                values[n].dtype,
                values[n].device,
            )
            for n in self.tensors
        ]
        found = {
            s for shape, stride, *_ in metas for e in (*shape, *stride) for s in e.free_symbols
        }
        found |= {s for e in self._sizes.values() for s in e.free_symbols}
        self.ints = sorted(map(str, found))
        self._strides = [stride for _, stride, *_ in metas]
        self._known: dict[tuple[int, ...], list[tuple[int, ...]] | None] = {}
        own = Symbolic.of({name: outer.hints[name] for name in self.ints})
        given = [*own.ints.values(), *(own.tensor(*meta) for meta in metas)]
        free = [
            len(self.ints) + i
            for i, n in enumerate(self.tensors)
            if n in segment.donated and values[n].is_contiguous()
        ]
        self._compiled: Compiled = _compat_inductor.compile_segment(self.plain, own, given, free)
        self._guards = own.guards()

    def plain(self, *args: Any) -> tuple[Tensor, ...]:
        """The segment as it stands."""
        count = len(self.ints)
        ints = dict(zip(self.ints, args[:count], strict=True))
        env: dict[fx.Node, Any] = {n: evaluate_size(e, ints) for n, e in self._sizes.items()}
        env.update(zip(self.tensors, args[count:], strict=True))
        for node in self._nodes:
            given, named = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*given, **named)
        return tuple(env[n] for n in self._outputs)

    def forward(self, held: list[Any]) -> Sequence[Tensor]:
        count = len(self.ints)
        wanted = self._wanted(tuple(held[:count]))
        if wanted is not None and all(map(_lies_as, held[count:], wanted)):
            return self._compiled(held)
        STATS.eager_calls += 1
        return self.plain(*held)

    def _wanted(self, ints: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """Strides that were compiled for; None where sizes were assumed that these are not."""
        if ints not in self._known:
            values = {
                sympy.Symbol(n, integer=True): sympy.Integer(v)
                for n, v in zip(self.ints, ints, strict=True)
            }
            holds = all(bool(g.xreplace(values)) for g in self._guards)
            self._known[ints] = (
                [tuple(int(e.xreplace(values)) for e in s) for s in self._strides]
                if holds
                else None
            )
        return self._known[ints]


def _lies_as(x: Tensor, strides: tuple[int, ...]) -> bool:
    """``x`` has elements, and these strides wherever it has more than one row."""
    return x.numel() > 0 and (
        x.stride() == strides
        or all(a == b or n == 1 for a, b, n in zip(x.stride(), strides, x.shape, strict=True))
    )


def evaluate_size(expr: Size, values: Mapping[str, Any]) -> Any:
    """``expr`` with ints or symbolic ints for its names."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return values[str(expr)]
    args = [evaluate_size(a, values) for a in expr.args]
    if expr.is_Add or expr.is_Mul:
        op = operator.add if expr.is_Add else operator.mul
        return functools.reduce(op, args)
    if expr.is_Pow:
        return args[0] ** args[1]
    return _SIZE_OPS[type(expr).__name__](*args)


_SIZE_OPS: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod,
    "PythonMod": operator.mod, "Max": torch.sym_max, "Min": torch.sym_min,
}  # fmt: skip


def _join(
    module: fx.GraphModule, parts: Sequence[Segment | fx.Node], values: Mapping[fx.Node, Any],
    sizes: Symbolic, advance: Callable[[], None],
) -> fx.GraphModule:  # fmt: skip
    """The body with its segments compiled."""
    root = torch.nn.Module()
    root.__dict__.update({k: v for k, v in module.__dict__.items() if k in ("_buffers",)})
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    ints: dict[str, fx.Node] = {}
    calls = 0
    for part in parts:
        if isinstance(part, fx.Node):
            env[part] = graph.node_copy(part, env.__getitem__)
            if part.op == "placeholder" or part.target is runtime.clamp:
                ints[part.name if part.op != "placeholder" else str(part.target)] = env[part]
            value = values.get(part)
            if _comes_from_outside(part) and isinstance(value, Tensor):
                env[part] = graph.call_function(runtime.laid_out, (env[part], _order(value)))
            continue
        if not part.gains:
            for node in part.nodes:
                env[node] = graph.node_copy(node, env.__getitem__)
            continue
        if "rows" not in ints:
            ints["rows"] = graph.call_function(operator.sub, (ints["hi"], ints["lo"]))
        run = SegmentCall(part, values, sizes)
        root.add_module(f"segment{calls}", run)
        held = graph.call_function(
            runtime.box, (*(ints[n] for n in run.ints), *(env[n] for n in run.tensors))
        )
        results = graph.call_module(f"segment{calls}", (held,))
        for i, node in enumerate(part.outputs):
            env[node] = graph.call_function(operator.getitem, (results, i))
        calls += 1
        advance()
    graph.lint()
    return fx.GraphModule(root, graph)


def _comes_from_outside(node: fx.Node) -> bool:
    """The real value may lie in memory otherwise than the fake one."""
    source = node
    while source.target is operator.getitem and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source.op == "call_function" and source.target not in (runtime.take, runtime.clamp)


def _order(value: Tensor) -> tuple[int, ...]:
    """Dimensions by stride, the largest first."""
    if value.is_contiguous():
        return tuple(range(value.dim()))
    return (0, 2, 1, 3)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's standard error while a body compiles."""
    before = _compat_inductor.cache_counters()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"compiling {label}", total=total)
        yield lambda: bar.advance(task)
    hits, _ = _compat_inductor.cache_counters()
    STATS.segments += total
    STATS.cached += hits - before[0]
