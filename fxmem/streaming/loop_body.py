"""The graph of one loop body under construction: where a value comes from in a chunk.

In a body, a CUT value is its chunk, an operand that is whole in memory is read by slice, and sizes
follow the chunk.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from fxmem.axes.signature import Cut, TensorInfo
from fxmem.axes.size_calls import fold
from fxmem.axes.sizes import AT, CHUNKS, HI, LO, STEP, Size, T
from fxmem.frontend.capture import canonical
from fxmem.program import body_ops as runtime
from fxmem.rewriting.patterns import RESHAPES
from fxmem.rules import lookup
from fxmem.streaming.flex_slices import slices
from fxmem.streaming.labels import Kind, Labels, Use, tensor_operands

Handler = Callable[["Body", fx.Node], fx.Node | None]
"""Emits one node in a way of its own, such as attention on a chunk."""

_AS_RESHAPE = (*RESHAPES, "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
"""Known by the shape of their result; in a chunk they may meet strides, or an axis of one row."""


class Ints:
    """Integer expressions as nodes of a graph, each computed once."""

    def __init__(self, graph: fx.Graph, names: Sequence[str]) -> None:
        self.graph = graph
        self.memo: dict[Size, Any] = {
            sympy.Symbol(n, integer=True, positive=True): graph.placeholder(n) for n in names
        }
        for symbol in (LO, HI, AT):
            if str(symbol) in names:
                self.memo[symbol] = self.memo[
                    sympy.Symbol(str(symbol), integer=True, positive=True)
                ]

    def __call__(self, expr: Size) -> Any:
        return fold(expr, self.memo, self.graph.call_function)

    def rows(self, cut: Cut) -> tuple[Any, Any]:
        """``(first row, number of rows)`` of the current chunk."""
        if cut.offset == 0 and cut.length == T:
            return self(LO), self(HI - LO)
        if cut.length == CHUNKS:
            key = sympy.Symbol("chunk")
            if key not in self.memo:
                self.memo[key] = self.graph.call_function(operator.floordiv, (self(LO), self(STEP)))
            return self.memo[key], 1
        start, stop = (self._clamped(edge - cut.offset, cut.length) for edge in (LO, HI))
        key = _rows(cut)
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
        self._last: fx.Node | None = next(iter(reversed(self.graph.nodes)), None)
        self.names: dict[fx.Node, str] = {}
        self.local: Mapping[fx.Node, Cut] = {}
        """Of the named: those with this rank's rows alone, and where these are."""
        self.gathered: dict[fx.Node, None] = {}
        """Of these: those that are read whole, in an order that all ranks have."""
        self.by_rank = str(AT) in extra
        self.sums: set[fx.Node] = set()
        self.order: dict[fx.Node, int] = {}
        self.kept: set[fx.Node] = set()
        self.masks: dict[str, fx.Node] = {}
        self.mask_of: dict[fx.Node, str] = {}
        self.carried: dict[fx.Node, str] = {}
        """Op that hands its state on -> the buffer that holds it."""
        self.tapes: dict[fx.Node, fx.Node] = {}
        """Backward op -> what its forward in this body left for it."""
        self.handed_on: list[tuple[Any, Any]] = []
        self.module = torch.nn.Module()

    def input(self, name: str) -> fx.Node:
        """A tensor argument; arguments come after the ints, in order of first use."""
        if name not in self.tensors:
            self.tensors[name] = self.opaque(name)
        return self.tensors[name]

    def opaque(self, name: str) -> fx.Node:
        """Any other argument, after the arguments made so far."""
        last, graph = self._last, self.graph  # none where no size varies
        with graph.inserting_after(last) if last is not None else graph.inserting_before():
            made = self._last = graph.placeholder(name)
        return made

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def whole(self, node: fx.Node) -> Any:
        """The complete tensor of a value that exists outside this graph (or was computed here
        whole).
        """
        if (node, None) in self.chunks:
            return self.chunks[node, None]
        value: Any = self.input(self._whole_name(node))
        info = self.joint.info[node]
        value.meta["joint"] = node
        if self.labels.of(node).kind is not Kind.PARTIAL:
            value.meta["info"] = info
        if self.labels.of(node).kind is Kind.PARTIAL and accumulator(info.dtype) != info.dtype:
            value = self.call(torch.ops.aten._to_copy.default, value, dtype=info.dtype)
        return value

    def _whole_name(self, node: fx.Node) -> str:
        if node not in self.local:
            return self.names[node]
        self.gathered[node] = None
        return gathered(self.names[node])

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
            if own := self.by_rank and self.local.get(node) == cut:
                start = self.ints(AT)
            source = self.input(self.names[node] if own else self._whole_name(node))
            if cut.length == CHUNKS:
                value = self.call(runtime.entry, source, start)
            else:
                value = self.call(runtime.take, source, cut.dim, start, rows, *extra)
            info = self.joint.info[node]
            value.meta["info"] = TensorInfo(_chunk_shape(info, cut), info.dtype)
            if self.labels.of(node).kind is Kind.PARTIAL and accumulator(info.dtype) != info.dtype:
                value = self.call(torch.ops.aten._to_copy.default, value, dtype=info.dtype)
        self.chunks[node, cut] = value
        return value

    def _flex(self, node: fx.Node, cut: Cut) -> fx.Node:
        cuts = slices(self.labels, node, cut)
        assert cuts is not None, f"{node} cannot be sliced"
        operands = tensor_operands(node, self.joint)
        uses = tuple(Use(o, c) for o, c in zip(operands, cuts, strict=True))
        if (
            cuts
            and cuts[0] is not None
            and (cuts[0].offset, cuts[0].length) != (cut.offset, cut.length)
        ):
            return self.moved(uses[0], cut)
        return self.copy(node, uses, cut)

    def moved(self, use: Use, cut: Cut) -> Any:
        """Rows of a slice along the cut axis: those rows of its operand that ``cut`` asks for."""
        source = self.operand(use)
        if use.cut is None or use.cut == cut:
            return source
        (start, count), (first, _) = self.ints.rows(cut), self.ints.rows(use.cut)
        skipped = self.call(operator.add, start, self.ints(cut.offset - use.cut.offset))
        at = self.call(operator.sub, skipped, first)
        stop = self.call(operator.add, at, count)
        return self.call(torch.ops.aten.slice.Tensor, source, cut.dim, at, stop)

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
        pending, row = enumerate(uses), lookup(node.target)

        def convert(a: fx.Node) -> Any:
            if self.joint.info[a] is None:
                return self.ints(canonical(a.meta["val"], self.joint.symbols))
            at, use = next(pending)
            value = self.operand(use)
            dense = row is not None and at in row.dense
            return self.call(runtime.contiguous, value) if dense else value

        args, kwargs = fx.map_arg((node.args, node.kwargs), convert)
        info = self.joint.info[node]
        if row is not None and row.sizes is not None:
            if cut is not None:
                self.ints.memo[_rows(cut)] = self.ints.rows(cut)[1]
            sizes = [self.ints(d) for d in _chunk_shape(info, cut)]
            args = (*args[: row.sizes], sizes, *args[row.sizes + 1 :])
        if row is not None and row.place is not None and cut is not None:
            where = [self.ints(v) for v in (cut.outer, cut.inner, cut.length)]
            where = [cut.dim, *where[:2], self.ints.rows(cut)[0], where[2]]
            args = (*args[: row.place], where, *args[row.place + 1 :])
        target = node.target
        if str(target) in _AS_RESHAPE:
            target = torch.ops.aten.reshape.default
        elif str(target) == "aten.clone.default" and _dense(kwargs):
            target, kwargs = runtime.contiguous, {}
        new = self.graph.call_function(target, tuple(args), dict(kwargs))
        if isinstance(info, TensorInfo):
            new.meta["info"] = TensorInfo(_chunk_shape(info, cut), info.dtype)
        return new

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


def _rows(cut: Cut) -> sympy.Symbol:
    """How many rows the chunk has."""
    return sympy.Symbol(f"rows({cut.offset},{cut.length})")


def _chunk_shape(info: TensorInfo, cut: Cut | None) -> tuple[Size, ...]:
    return info.shape if cut is None else cut.shape(info.shape, _rows(cut))


def gathered(name: str) -> str:
    """The whole of what ``name`` has this rank's rows of."""
    return f"{name}_whole"


def _dense(kwargs: Any) -> bool:
    return bool(kwargs.get("memory_format") is torch.contiguous_format)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums over chunks are kept in float32 or wider and rounded once, at the end."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
