"""From a schedule to a program: every loop body, straight line and mask becomes an
``fx.GraphModule``.

The rewrite decides nothing; it follows the labels. In a body, a CUT value is its chunk, an operand
that is whole in memory is read by slice, sizes follow the chunk, results are written into buffers
and sums are added into accumulators in place, matrix products without a temporary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from fxmem import program as ir
from fxmem import runtime
from fxmem.axes import Cut, TensorInfo
from fxmem.capture import canonical
from fxmem.labels import ATTENTION, Kind, Labels, Use, slices, tensor_operands
from fxmem.rules import lookup
from fxmem.schedule import Loop, Schedule, producer
from fxmem.sizes import HI, LO, Size, T, has_axis, same

Handler = Callable[["Body", fx.Node], fx.Node | None]


class BodyPass(Protocol):
    """A rewrite of the graph of a finished loop body; leaves the one it is given alone."""

    @property
    def name(self) -> str: ...

    def run(self, graph: fx.Graph, /) -> fx.Graph: ...


_AS_RESHAPE = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "_unsafe_view.default", "squeeze.default", "squeeze.dim", "squeeze.dims",
    )
)  # fmt: skip
"""Known by the shape of their result; in a chunk they may meet strides, or an axis of one row."""


class Ints:
    """Integer expressions as nodes of a graph, each computed once."""

    def __init__(self, graph: fx.Graph, names: Sequence[str]) -> None:
        self.graph = graph
        self.memo: dict[Size, Any] = {
            sympy.Symbol(n, integer=True, positive=True): graph.placeholder(n) for n in names
        }
        for symbol in (LO, HI):
            if str(symbol) in names:
                self.memo[symbol] = self.memo[
                    sympy.Symbol(str(symbol), integer=True, positive=True)
                ]

    def __call__(self, expr: Size) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr not in self.memo:
            self.memo[expr] = self._emit(expr)
        return self.memo[expr]

    def _emit(self, expr: Size) -> Any:
        if expr.is_Rational or expr.is_Float:
            return float(expr)
        if expr.is_Add or expr.is_Mul:
            op = operator.add if expr.is_Add else operator.mul
            total: Any = None
            for arg in expr.args:
                value = self(arg)
                total = value if total is None else self.graph.call_function(op, (total, value))
            return total
        if expr.is_Pow:
            return self.graph.call_function(operator.pow, (self(expr.base), self(expr.exp)))
        args = tuple(self(a) for a in expr.args)
        table: dict[str, Callable[..., Any]] = {
            "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod,
            "PythonMod": operator.mod, "Max": max, "Min": min, "IntTrueDiv": operator.truediv,
            "FloatTrueDiv": operator.truediv, "ToFloat": float,
        }  # fmt: skip
        return self.graph.call_function(table[type(expr).__name__], args)

    def rows(self, cut: Cut) -> tuple[Any, Any]:
        """``(first row, number of rows)`` of the current chunk."""
        if cut.offset == 0 and cut.length == T:
            return self(LO), self(HI - LO)
        start, stop = (self._clamped(edge - cut.offset, cut.length) for edge in (LO, HI))
        key = sympy.Symbol(f"rows({cut.offset},{cut.length})")
        if key not in self.memo:
            self.memo[key] = self.graph.call_function(operator.sub, (stop, start))
        return start, self.memo[key]

    def _clamped(self, expr: Size, limit: Size) -> Any:
        key = sympy.Symbol(f"clamp({expr},{limit})")
        if key not in self.memo:
            self.memo[key] = self.graph.call_function(runtime.clamp, (self(expr), self(limit)))
        return self.memo[key]


class Body:
    """Builds one graph. ``env`` maps values to nodes; ``whole`` tensors become placeholders on
    first use.
    """

    def __init__(self, labels: Labels, ints: Sequence[str], extra: Sequence[str] = ()) -> None:
        self.labels = labels
        self.joint = labels.joint
        self.graph = fx.Graph()
        self.ints = Ints(self.graph, [*ints, *extra])
        self.chunks: dict[tuple[fx.Node, Cut | None], Any] = {}
        self.tensors: dict[str, fx.Node] = {}
        self._last: fx.Node = next(iter(reversed(self.graph.nodes)))
        self.names: dict[fx.Node, str] = {}
        self.sums: set[fx.Node] = set()
        self.order: dict[fx.Node, int] = {}
        self.kept: set[fx.Node] = set()
        self.masks: dict[str, fx.Node] = {}
        self.mask_of: dict[fx.Node, str] = {}
        self.module = torch.nn.Module()

    def input(self, name: str) -> fx.Node:
        """A tensor argument; arguments come after the ints, in order of first use."""
        if name not in self.tensors:
            self.tensors[name] = self.opaque(name)
        return self.tensors[name]

    def opaque(self, name: str) -> fx.Node:
        """Any other argument, after the arguments made so far."""
        with self.graph.inserting_after(self._last):
            self._last = self.graph.placeholder(name)
        return self._last

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def whole(self, node: fx.Node) -> Any:
        """The complete tensor of a value that exists outside this graph (or was computed here
        whole).
        """
        if (node, None) in self.chunks:
            return self.chunks[node, None]
        value: Any = self.input(self.names[node])
        info = self.joint.info[node]
        value.meta["joint"] = node
        if self.labels.of(node).kind is not Kind.PARTIAL:
            value.meta["info"] = info
        if self.labels.of(node).kind is Kind.PARTIAL and _accumulator(info.dtype) != info.dtype:
            value = self.call(torch.ops.aten._to_copy.default, value, dtype=info.dtype)
        return value

    def chunk(self, node: fx.Node, cut: Cut) -> Any:
        """The current chunk of ``node`` under ``cut``."""
        if (node, cut) in self.chunks:
            return self.chunks[node, cut]
        if self.labels.of(node).kind is Kind.FLEX and node not in self.names:
            value = self._flex(node, cut)
        else:
            start, rows = self.ints.rows(cut)
            extra = (
                ()
                if (cut.outer, cut.inner) == (1, 1)
                else (self.ints(cut.outer), self.ints(cut.inner))
            )
            source = self.input(self.names[node])
            value = self.call(runtime.take, source, cut.dim, start, rows, *extra)
            info = self.joint.info[node]
            count = sympy.Symbol(f"rows({cut.offset},{cut.length})")
            value.meta["info"] = TensorInfo(cut.shape(info.shape, count), info.dtype)
            if self.labels.of(node).kind is Kind.PARTIAL and _accumulator(info.dtype) != info.dtype:
                value = self.call(torch.ops.aten._to_copy.default, value, dtype=info.dtype)
        self.chunks[node, cut] = value
        return value

    def _flex(self, node: fx.Node, cut: Cut) -> fx.Node:
        cuts = slices(self.labels, node, cut)
        assert cuts is not None, f"{node} cannot be sliced"
        operands = tensor_operands(node, self.joint)
        uses = tuple(Use(o, c) for o, c in zip(operands, cuts, strict=True))
        return self.copy(node, uses, cut)

    def operand(self, use: Use) -> Any:
        if use.cut is None:
            label = self.labels.of(use.operand)
            if label.kind is Kind.FLEX and use.operand not in self.names:
                return self._flex_whole(use.operand)
            return self.whole(use.operand)
        return self.chunk(use.operand, use.cut)

    def _flex_whole(self, node: fx.Node) -> Any:
        """A FLEX operand without the cut axis in this use (a constant, say) is made in full."""
        if (node, None) not in self.chunks:
            uses = tuple(Use(o, None) for o in tensor_operands(node, self.joint))
            self.chunks[node, None] = self.copy(node, uses, None)
        return self.chunks[node, None]

    def copy(self, node: fx.Node, uses: Sequence[Use], cut: Cut | None) -> fx.Node:
        """``node`` with operands by ``uses`` and sizes for the output cut ``cut``."""
        pending = list(uses)

        def convert(a: fx.Node) -> Any:
            if self.joint.info[a] is None:
                return self.ints(canonical(a.meta["val"], self.joint.symbols))
            return self.operand(pending.pop(0))

        args, kwargs = fx.map_arg((node.args, node.kwargs), convert)
        row = lookup(node.target)
        info = self.joint.info[node]
        if row is not None and row.sizes is not None:
            shape = info.shape if cut is None else cut.shape(info.shape, sympy.Symbol("_rows"))
            if cut is not None:
                self.ints.memo[sympy.Symbol("_rows")] = self.ints.rows(cut)[1]
                shape = tuple(shape)
            sizes = [self._size(d, cut) for d in shape]
            args = (*args[: row.sizes], sizes, *args[row.sizes + 1 :])
        target = node.target
        if str(target) in _AS_RESHAPE:
            target = torch.ops.aten.reshape.default
        elif str(target) == "aten.clone.default" and _dense(kwargs):
            target, kwargs = runtime.contiguous, {}
        new = self.graph.call_function(target, tuple(args), dict(kwargs))
        if isinstance(info, TensorInfo):
            rows = sympy.Symbol(f"rows({cut.offset},{cut.length})") if cut is not None else None
            new.meta["info"] = (
                info if cut is None else TensorInfo(cut.shape(info.shape, rows), info.dtype)
            )
        return new

    def _size(self, expr: Size, cut: Cut | None) -> Any:
        rows = sympy.Symbol("_rows")
        if cut is None or rows not in expr.free_symbols:
            return self.ints(expr)
        _, count = self.ints.rows(cut)
        factor = sympy.expand(expr / rows)
        return count if factor == 1 else self.call(operator.mul, self.ints(factor), count)

    def item(self, node: fx.Node) -> Any:
        """Element of a tuple made here; None where the maker has added it to its accumulator
        itself.
        """
        source = self.chunks[node.args[0], None]
        if isinstance(source, tuple):
            return source[node.args[1]]
        return self.call(operator.getitem, source, node.args[1])

    def finish(self) -> fx.GraphModule:
        self.graph.lint()
        return fx.GraphModule(self.module, self.graph)


def _dense(kwargs: Any) -> bool:
    return bool(kwargs.get("memory_format") is torch.contiguous_format)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class Emitter:
    """Assigns names and turns a schedule into steps."""

    def __init__(
        self, plan: Schedule, name: str, causal: bool, handlers: dict[str, Handler],
        body_passes: Sequence[BodyPass] = (),
    ) -> None:  # fmt: skip
        self.plan, self.labels, self.joint = plan, plan.labels, plan.labels.joint
        self.name, self.causal = name, causal
        self.handlers, self.body_passes = handlers, body_passes
        self.ints = sorted({str(s) for e in self.joint.symbols.values() for s in e.free_symbols})
        self.names: dict[fx.Node, str] = {}
        self.masks: dict[fx.Node, ir.Mask] = {}

    def run(self) -> ir.Program:
        inputs = [
            *self.joint.inputs,
            self.joint.seed,
            *(t for t in self.joint.tangents if t is not None),
        ]
        for i, node in enumerate(inputs):
            self.names[node] = f"x{i}"
        steps: list[ir.Step] = []
        last = max([*self.plan.straight, *(loop.stage for loop in self.plan.loops)], default=0)
        loops = {loop.stage: loop for loop in self.plan.loops}
        for stage in range(last + 1):
            if stage in self.plan.straight:
                steps.append(self._straight(self.plan.straight[stage]))
            if stage in loops:
                steps.append(self._loop(loops[stage]))
        outputs = [self.names[r] for r in self.plan.roots]
        shapes = {
            self.names[n]: (self.joint.info[n].shape, self.joint.info[n].dtype) for n in self.names
        }
        return ir.Program(
            self.name, self.ints, [self.names[n] for n in inputs], list(outputs),
            _free(steps, outputs), list(self.masks.values()), self.causal,
            list(self.labels.barriers), shapes,
        )  # fmt: skip

    def _body(self, *extra: str) -> Body:
        body = Body(self.labels, self.ints, extra)
        body.names = self.names
        return body

    def _straight(self, nodes: list[fx.Node]) -> ir.Straight:
        body = self._body()
        results = []
        for node in nodes:
            source = producer(node)
            if (source, None) not in body.chunks:
                uses = self.labels.uses.get(source) or tuple(
                    Use(o, None) for o in tensor_operands(source, self.joint)
                )
                uses = tuple(Use(u.operand, None) for u in uses)
                body.chunks[source, None] = (
                    body.graph.node_copy(source)
                    if source.op == "get_attr"
                    else body.copy(source, uses, None)
                )
                if source.op == "get_attr":
                    setattr(body.module, source.target, getattr(self.joint.module, source.target))
            if node is not source:
                body.chunks[node, None] = body.call(
                    operator.getitem, body.chunks[source, None], node.args[1]
                )
            results.append(node)
        for i, node in enumerate(results):
            self.names[node] = f"s{len(self.names)}_{i}"
        body.graph.output(tuple(body.chunks[n, None] for n in results))
        return ir.Straight(
            body.finish(), self.ints, list(body.tensors), [self.names[n] for n in results]
        )

    def _loop(self, loop: Loop) -> ir.Loop:
        allocate = []
        for node in (*loop.buffers, *loop.sums):
            info: TensorInfo = self.joint.info[node]
            total = node in loop.sums
            self.names[node] = f"{'acc' if total else 'buf'}{len(self.names)}"
            dtype = _accumulator(info.dtype) if total else info.dtype
            allocate.append(ir.Buffer(self.names[node], info.shape, dtype, info.dtype, total))
        body = self._body("lo", "hi")
        body.sums = set(loop.sums)
        body.kept = set(loop.buffers)
        body.order = {n: i for i, n in enumerate(loop.nodes)}
        masks = self._loop_masks(loop, body)
        for node in loop.nodes:
            self._node(body, node)
        body.graph.output(None)
        for one in self.body_passes:
            body.graph = one.run(body.graph)
        sums = [b for b in allocate if b.zero and b.dtype != b.result]
        return ir.Loop(
            body.finish(), self.ints, list(body.tensors), masks, loop.direction < 0, allocate, sums
        )

    def _loop_masks(self, loop: Loop, body: Body) -> list[str]:
        """One argument per distinct attention mask of the loop: its spans for the current chunk."""
        names = []
        for node in loop.nodes:
            if node in self.labels.masked:
                operand = node.args[ATTENTION[str(node.target)][0]]
                assert isinstance(operand, fx.Node)
                if operand not in self.masks:
                    self.masks[operand] = self._mask(operand)
                name = self.masks[operand].name
                if name not in names:
                    names.append(name)
        body.masks = {name: body.opaque(name) for name in names}
        body.mask_of = {n: m.name for n, m in self.masks.items()}
        return names

    def _mask(self, operand: fx.Node) -> ir.Mask:
        body = self._body("lo", "hi")
        info = self.joint.info[operand]
        queries = info.shape[-2]
        if has_axis(queries):
            value = body.chunk(operand, Cut(len(info.shape) - 2, queries))
        else:
            value = body.operand(Use(operand, None))
        body.graph.output(value)
        module = body.finish()
        return ir.Mask(f"mask{len(self.masks)}", module, self.ints, list(body.tensors), module.code)

    def _node(self, body: Body, node: fx.Node) -> None:
        label = self.labels.label[node]
        handler = self.handlers.get(str(node.target))
        value: Any = handler(body, node) if handler is not None else None
        if value is None and node not in body.sums:
            value = _default(body, node, label)
        if node in body.sums:
            _accumulate(body, node, value)
        elif value is not None:
            key = label.cut if not isinstance(label, tuple) else None
            body.chunks[node, key] = value
            if node in body.kept:
                self._write(body, node, value, label.cut)

    def _write(self, body: Body, node: fx.Node, value: Any, cut: Cut) -> None:
        start, _ = body.ints.rows(cut)
        extra = (
            () if (cut.outer, cut.inner) == (1, 1) else (body.ints(cut.outer), body.ints(cut.inner))
        )
        body.call(runtime.put, body.input(self.names[node]), value, cut.dim, start, *extra)


def _default(body: Body, node: fx.Node, label: Any) -> Any:
    if node.target is operator.getitem:
        return body.item(node)
    cut = label.cut if not isinstance(label, tuple) else None
    return body.copy(node, body.labels.uses[node], cut)


def _accumulate(body: Body, node: fx.Node, value: Any) -> None:
    """Add the chunk's part of a sum; products go straight into the accumulator."""
    acc = body.input(body.names[node])
    target = str(node.target)
    forms: dict[str, Callable[..., None]] = {
        "aten.mm.default": runtime.add_mm,
        "aten.bmm.default": runtime.add_bmm,
        "fxmem.expert_weight_grad.default": runtime.add_expert_weight,
    }
    if value is None and target in forms:
        body.call(forms[target], acc, *(body.operand(u) for u in body.labels.uses[node]))
    elif value is None and target == "aten.embedding_dense_backward.default":
        grad, index = (body.operand(u) for u in body.labels.uses[node])
        body.call(runtime.add_embedding, acc, grad, index, node.args[3])
    elif value is None and node.target is operator.getitem:
        part = body.item(node)
        if part is not None:
            body.call(runtime.add, acc, part)
    elif value is None:
        body.call(runtime.add, acc, body.copy(node, body.labels.uses[node], None))


def _free(steps: list[ir.Step], outputs: Sequence[str]) -> list[ir.Step]:
    """Drop every allocated name after its last reader."""
    last: dict[str, int] = {}
    made: set[str] = set()
    for i, step in enumerate(steps):
        if isinstance(step, ir.Loop):
            made.update(b.name for b in step.allocate)
        elif isinstance(step, ir.Straight):
            made.update(step.results)
        if not isinstance(step, ir.Free):
            for n in step.tensors:
                last[n] = i
    out: list[ir.Step] = []
    for i, step in enumerate(steps):
        out.append(step)
        names = [n for n in made if last.get(n) == i and n not in outputs]
        if names:
            out.append(ir.Free(sorted(names)))
    return out


__all__ = ["Body", "Emitter", "Handler", "Ints", "same"]
