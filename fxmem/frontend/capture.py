"""From a Dynamo graph to a canonical capture: what is computed once, and what is cut into regions.

*Preamble*: everything that depends on no parameter (position ids, masks, cos/sin, shifted labels).
It is lowered to ATen once and runs at the start of every call. Values of it that are too wide to
stand whole (a ``T x T`` mask, a one-hot of the labels) are not computed there: their producers sink
into the regions that use them, which then take the narrow leaves. *Main*: everything that depends
on a parameter, in order.

Grad mode and autocast switches become a property of each node (:class:`Context`), so that any
stretch of the graph can be traced on its own.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from fxmem._compat import capture_stack
from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat.data_sizes import by_data
from fxmem.axes.sizes import Size, T, per_token, size
from fxmem.frontend.functional_writes import is_of_held, is_write, written_inputs

NARROW_LIMIT = 512
"""Elements per token up to which a parameter-free value is computed whole."""


@dataclass(frozen=True, slots=True)
class Context:
    """Grad mode and autocast states under which a node runs."""

    grad: bool = True
    autocast: tuple[tuple[str, torch.dtype, bool], ...] = ()

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.grad), _compat.ambient_autocast(self.autocast):
            yield


class Graph(Protocol):
    """A Dynamo graph that can be run."""

    @property
    def gm(self) -> fx.GraphModule: ...

    @property
    def contexts(self) -> Mapping[fx.Node, Context]: ...

    @property
    def inputs(self) -> Sequence[fx.Node]: ...


@dataclass(slots=True)
class Capture:
    """A Dynamo graph with its analysis; ``symbols`` renames its symbols to canonical ones."""

    gm: fx.GraphModule
    nodes: list[fx.Node]
    contexts: dict[fx.Node, Context]
    inputs: list[fx.Node]
    outputs: list[Any]
    parameters: set[fx.Node]
    main: list[fx.Node]
    main_set: frozenset[fx.Node]
    symbols: dict[sympy.Symbol, Size]
    fake_mode: Any
    bindings: list[tuple[int, int | None, Size]]
    assumed: list[Any]
    """Comparisons of sizes that Dynamo and the passes before have decided."""
    length: sympy.Symbol = T
    """What the capture of the whole calls the length that is ``T`` here."""
    written: set[fx.Node] = field(default_factory=set)
    """The inputs that are written between regions and read again: a region takes a copy."""
    changed: set[fx.Node] = field(default_factory=set)
    """Other inputs that are written: all that reads them takes what they held at the start."""
    sizes: list[fx.Node] = field(init=False)  # among the inputs
    parameter_names: set[str] = field(init=False)
    lengths: list[sympy.Symbol] = field(init=False)
    """``T``, and sizes that stand last in the shape of an input, and before no other."""

    def __post_init__(self) -> None:
        self.parameter_names = {n.name for n in self.parameters}
        self.sizes = [n for n in self.inputs if isinstance(value_of(n), torch.SymInt)]
        last: set[sympy.Symbol] = {T}
        before: set[sympy.Symbol] = set()
        for n in filter(is_tensor, self.inputs):
            found = [d.free_symbols for d in self.shape(n) if d.free_symbols]
            last.update(*found[-1:])
            before.update(*found[:-1])
        self.lengths = [T, *sorted(last - before - {T}, key=str)]

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """Canonical sizes of a tensor node."""
        return canonical_shape(value_of(node), self.symbols)

    def guards(self) -> list[Any]:
        """The comparisons of sizes that are decided by now, each a guard of this capture."""
        return size_guards(self.fake_mode, self.symbols)

    @property
    def fixes_length(self) -> bool:
        """What was decided by now leaves one length only."""
        found = [s for s, name in self.symbols.items() if name == T]
        return any(_compat.is_fixed(self.fake_mode, s) for s in found)

    def assume(self, guards: Sequence[Any]) -> bool:
        """Whether these hold for the sizes of the call under way; they become guards then."""
        own = {x: s + (x - e) for s, e in self.symbols.items() for x in e.free_symbols}
        return _compat.assume(self.fake_mode, [g.xreplace(own) for g in guards])


def value_of(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def canonical(expr: Any, symbols: Mapping[sympy.Symbol, Size]) -> Size:
    if isinstance(expr, int):
        return sympy.Integer(expr)
    expr = size(expr)
    found = symbols.get(expr)
    if isinstance(found, sympy.Symbol):
        return found
    return sympy.expand(expr.xreplace(dict(symbols)))


def canonical_shape(value: torch.Tensor, symbols: Mapping[sympy.Symbol, Size]) -> tuple[Size, ...]:
    return tuple(canonical(s, symbols) for s in value.shape)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def is_number(node: fx.Node) -> bool:
    """A number that values decide, such as an ``x.any().item()``: whoever asks for it makes it."""
    value = value_of(node)
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and by_data(value)


def behind(node: fx.Node) -> list[fx.Node]:
    """``node``; of a number the values that decide it."""
    return [m for n in node.all_input_nodes for m in behind(n)] if is_number(node) else [node]


def is_border(node: fx.Node) -> bool:
    """It runs between regions: a hook on a gradient, a piece, a write to what the model holds."""
    source = node.args[0] if node.target is operator.getitem else node
    piece = isinstance(source, fx.Node) and capture_stack.is_piece(source)
    return piece or _compat_hooks.is_hook(node) or is_of_held(node)


def is_size(value: Any) -> bool:
    """An integer, symbolic or not, or a tuple of them: it needs no computing."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(is_size(v) for v in value)
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_wide(shape: Sequence[Size], lengths: Sequence[sympy.Symbol] = (T,)) -> bool:
    """Too large per token to stand whole without need."""
    count = sum(any(s in d.free_symbols for s in lengths) for d in shape)
    return count > 1 or (count == 1 and per_token(shape) > NARROW_LIMIT)


def analyse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    ambient: Sequence[tuple[str, torch.dtype, bool]],
) -> Capture:
    """Split ``gm``, which must be free of writes in place, into preamble and main."""
    contexts, nodes = contexts_of(gm, ambient)
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    output = next(iter(gm.graph.find_nodes(op="output")))
    needed = live(nodes, output.all_input_nodes)
    nodes = [n for n in nodes if n in needed or n.op == "placeholder"]
    parameters = {
        n for n, v in zip(inputs, example_inputs, strict=True)
        if isinstance(v, torch.nn.Parameter) or (isinstance(v, torch.Tensor) and v.requires_grad)
    }  # fmt: skip
    # what a piece writes is read after it, not at the start
    ids = set(map(id, capture_stack.written(nodes)))
    changed, again = written_inputs(nodes)
    written = again | {n for n, v in zip(inputs, example_inputs, strict=True) if id(v) in ids}
    heavy: set[fx.Node] = parameters | written
    main = []
    for n in nodes:
        if n.op in ("placeholder", "get_attr"):
            continue
        if is_border(n) or any(a in heavy for a in n.all_input_nodes):
            heavy.add(n)
            main.append(n)
    symbols = _symbols(inputs, parameters, main)
    mode = _compat.fake_mode_of(gm)
    return Capture(
        gm, nodes, contexts, inputs, list(output.args[0]), parameters, main, frozenset(main),
        symbols, mode, _bindings(inputs, symbols), size_guards(mode, symbols),
        written=written, changed=changed - written,
    )  # fmt: skip


def size_guards(mode: Any, symbols: Mapping[sympy.Symbol, Size]) -> list[Any]:
    """What has been decided about sizes under ``mode``, in canonical names, in a fixed order.

    Not about strides: programs are right for any.
    """
    guards = _compat.size_guards(mode)
    found = {g.xreplace(dict(symbols)) for g in guards if g.free_symbols <= symbols.keys()}
    return sorted(found - {sympy.true}, key=str)


def has_varying_size(gm: fx.GraphModule) -> bool:
    """Some tensor input has a size that is not fixed."""
    values = [value_of(n) for n in gm.graph.find_nodes(op="placeholder")]
    return any(
        isinstance(s, torch.SymInt) and bool(s.node.expr.free_symbols)
        for v in values
        if isinstance(v, torch.Tensor)
        for s in v.shape
    )


def _bindings(
    inputs: Sequence[fx.Node], symbols: Mapping[sympy.Symbol, Size]
) -> list[tuple[int, int | None, Size]]:
    """Where each canonical symbol is read from in a call: (argument, dimension, size there).

    Read before anything is traced, since a trace may fix a size for good.
    """
    out: list[tuple[int, int | None, Size]] = []
    for i, n in enumerate(inputs):
        value = value_of(n)
        shape: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else (value,)
        for d, s in enumerate(shape):
            if isinstance(s, torch.SymInt) and s.node.expr in symbols:
                dim = d if isinstance(value, torch.Tensor) else None
                out.append((i, dim, symbols[s.node.expr]))
    return out


def contexts_of(
    gm: fx.GraphModule, ambient: Sequence[tuple[str, torch.dtype, bool]] = ()
) -> tuple[dict[fx.Node, Context], list[fx.Node]]:
    """Under what each node runs, and the nodes that compute; ``ambient``: autocast of the call."""
    grad, casts, opened = True, list(ambient), {}
    contexts, nodes = {}, []
    for n in gm.graph.nodes:
        kind = _compat.is_control_node(n)
        if kind == "grad":
            grad = bool(n.args[0])
        elif kind == "enter":
            device, dtype, enabled = n.args[:3]
            opened[n] = (device, dtype or torch.get_autocast_dtype(device), bool(enabled))
            casts.append(opened[n])
        elif kind == "exit":
            casts.remove(opened[n.args[0]])
        elif kind is None and n.op != "output":
            contexts[n] = Context(grad, tuple(casts))
            nodes.append(n)
    return contexts, nodes


def live(nodes: Sequence[fx.Node], results: Iterable[fx.Node]) -> set[fx.Node]:
    """What must run: for ``results``, or because it writes, as a piece of the model may do."""
    needed = set(results)
    for n in reversed(nodes):
        if n in needed or capture_stack.is_piece(n) or is_write(n):
            needed.update((n, *n.all_input_nodes))
    return needed


def _symbols(
    inputs: Sequence[fx.Node], parameters: set[fx.Node], main: Sequence[fx.Node]
) -> dict[sympy.Symbol, Size]:
    """Canonical names: ``T`` for the streamed length, ``n0``, ``n1``, ... for the others.

    The streamed axis is a symbol that stands last in the shape of an input: tokens in ``[B, T]``
    ids, in ``[B, T, d]`` states, in packed ``[T]`` streams; of several the one that stands last in
    most of what is computed. Where nothing computed has that many rows (an image is cut into
    patches), it may be any size: the batch. ``T`` is the length of the longest input, or of most of
    what is computed where that is longer (a prompt was put before the tokens). Strides and offsets
    have no name: Dynamo passes them as numbers that nobody reads.
    """
    votes: Counter[sympy.Symbol] = Counter()
    lengths: dict[sympy.Symbol, int] = {}
    order: list[sympy.Symbol] = []
    numbers: list[sympy.Symbol] = []
    inner: list[sympy.Symbol] = []
    voters: list[tuple[fx.Node, list[Any]]] = []
    for n in inputs:
        value = value_of(n)
        if isinstance(value, torch.SymInt) and n.users:
            numbers += sorted(value.node.expr.free_symbols, key=str)
        if not isinstance(value, torch.Tensor):
            continue
        sizes: tuple[Any, ...] = tuple(value.shape)
        found = [s.node.expr for s in sizes if isinstance(s, torch.SymInt)]
        inner += [x for x in map(size, sizes[1:-1]) if isinstance(x, sympy.Symbol)]
        symbolic = [e for e in found if e.free_symbols]  # the model may have fixed a size
        order += [x for e in symbolic for x in sorted(e.free_symbols, key=str)]
        voters += [(n, symbolic)] if symbolic else []
    # a state that learns has a say where no ids have
    for group in ([v for v in voters if v[0] not in parameters], voters):
        first = not votes
        for last, count in ((symbolic[-1], len(symbolic)) for _, symbolic in group):
            if len(last.free_symbols) == 1:
                (symbol,) = last.free_symbols
                excess = last - symbol
                if excess.is_Integer:
                    votes[symbol] += count if first else 0
                    lengths[symbol] = max(lengths.get(symbol, 0), int(excess))
    if votes and not any(_computed(main, s) for s in votes):
        votes.update(dict.fromkeys(order, 0))
    # a teacher's best words have their number last, behind the tokens; and the number of tokens
    # may be an input of its own
    beside = [s for s in (*inner, *numbers) if s in inner or s not in order]
    votes.update(dict.fromkeys(beside if votes else (), 0))
    streamed = max(votes, key=lambda s: (_computed(main, s), votes[s])) if votes else None
    if streamed is not None:
        lengths[streamed] = max(lengths.get(streamed, 0), _excess(main, streamed))
    rename: dict[sympy.Symbol, Size] = {}
    for s in dict.fromkeys([*order, *numbers]):
        # labels of length T - 1 may have been traced as the symbol itself
        fresh = sympy.Symbol(f"n{len(rename)}", integer=True, positive=True)
        rename[s] = T - lengths[s] if s == streamed else fresh
    return rename


def _computed(main: Sequence[fx.Node], symbol: sympy.Symbol) -> int:
    """Bytes, at the sizes of this call, of what is computed with ``symbol`` in its last size that
    grows evenly with anything: the patches of an image do not with its width.
    """
    total = 0
    for value, count in _floats(main):
        shape: Sequence[Any] = value.shape
        sizes = [s.node.expr for s in shape if isinstance(s, torch.SymInt)]
        growing = [g for g in map(_grows_with, sizes) if g]
        if growing and symbol in growing[-1]:
            total += _compat.hint_bytes(value) * count
    return total


def _floats(nodes: Sequence[fx.Node]) -> Iterable[tuple[torch.Tensor, int]]:
    """The values of floating point, and how many nodes have each: equal layers share theirs."""
    values = [value_of(n) for n in nodes]
    counts = Counter(map(id, values))
    for value in {id(v): v for v in values}.values():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            yield value, counts[id(value)]


@lru_cache(maxsize=4096)
def _grows_with(size: Any) -> frozenset[sympy.Symbol]:
    """The symbols of which a size is a multiple, but for something that does not depend on them."""
    return frozenset(
        s for s in size.free_symbols
        if s not in (size - size.coeff(s) * s).free_symbols | size.coeff(s).free_symbols
    )  # fmt: skip


def _excess(main: Sequence[fx.Node], symbol: sympy.Symbol) -> int:
    """How much longer than ``symbol`` most of what is computed is, by bytes."""
    weights: Counter[int] = Counter()
    for value, count in _floats(main):
        sizes = [
            s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in value.shape
        ]
        found = [e - symbol for e in sizes if symbol in e.free_symbols]
        if len(found) == 1 and found[0].is_Integer:
            fixed = [int(e) for e in sizes if e.is_Integer]
            weights[int(found[0])] += math.prod(fixed) * value.dtype.itemsize * count
    return max(weights, key=lambda k: weights[k], default=0)
