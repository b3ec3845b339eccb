"""Where to cut a model: regions between two narrow waists of the graph.

Walk the main nodes in order and look at the bytes per token of the values alive across each position. At a
*waist* a single state is alive (the residual stream): the smallest value that occurs again and again. Waists
split the graph into *segments*. A segment that mixes tokens (attention) starts a region and takes the
token-local segments after it along, up to the next mixing one; what precedes the first mixing segment (the
embedding) and what follows the last one without a counterpart elsewhere (final norm, LM head, loss) are
regions of their own. Values that merely pass by a region are not its inputs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem.capture import Capture, canonical, canonical_shape, call_node, is_tensor, run, value_of
from fxmem.preamble import Cone, Leaf, Preamble
from fxmem.sizes import has_axis, per_token


@dataclass(slots=True)
class Region:
    """A stretch of main nodes as a function of ints, tensors (in ``leaves`` order) and cones."""

    capture: Capture
    nodes: list[fx.Node]
    outputs: list[fx.Node]
    ints: list[fx.Node]
    inputs: list[fx.Node]
    leaves: list[Leaf]
    values: list[torch.Tensor]
    cones: list[tuple[fx.Node, Cone]]
    cone_args: list[list[int]]

    @property
    def needs_grad(self) -> list[bool]:
        """Which tensor inputs want a gradient."""
        return [bool(v.requires_grad) for v in self.values]

    @property
    def parameter_mask(self) -> list[bool]:
        named = {("input", p.name) for p in self.capture.parameters}
        return [leaf in named for leaf in self.leaves]

    def function(self, call: Callable[[fx.Node, Any, Any], Any] = call_node) -> Callable[..., list[Any]]:
        """``fn(*ints, *tensors) -> outputs``; ``call`` replaces single ops (canonicalisation)."""

        def fn(*values: Any) -> list[Any]:
            k = len(self.ints)
            env: dict[fx.Node, Any] = dict(zip(self.ints, values[:k], strict=True))
            tensors = values[k:]
            env.update(zip(self.inputs, tensors, strict=False))
            for (node, cone), args in zip(self.cones, self.cone_args, strict=True):
                ints = [env[i] for i in cone.ints]
                env[node] = cone.module(*ints, *(tensors[i] for i in args))
            run(self.nodes, env, self.capture, call)
            return [env[n] for n in self.outputs]

        return fn

    def key(self) -> str:
        """Structural identity: equal keys run the same program on other weights."""
        index: dict[fx.Node, str] = {}
        lines = []
        symbols = self.capture.symbols
        for n in self.ints:
            index[n] = f"i{len(index)}"
            lines.append(f"int {canonical(value_of(n), symbols)}")
        for leaf_value, parameter in zip(self.values, self.parameter_mask, strict=True):
            lines.append(f"in {_describe(leaf_value, symbols)} {parameter}")
        for i, n in enumerate(self.inputs):
            index[n] = f"t{i}"
        for (node, cone), args in zip(self.cones, self.cone_args, strict=True):
            index[node] = f"c{len(index)}"
            lines.append(f"cone {args} {cone.key}")
        for n in self.nodes:
            index.setdefault(n, f"v{len(index)}")
            args = fx.map_arg((n.args, n.kwargs), lambda a: _Name(index[a]))
            lines.append(f"{index[n]} = {_target(n)} {args} {self.capture.contexts[n]}")
        lines.append(f"out {[index[n] for n in self.outputs]}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _target(node: fx.Node) -> str:
    t = node.target
    return t if isinstance(t, str) else f"{getattr(t, '__module__', '')}.{getattr(t, '__qualname__', t)}"


def _describe(value: torch.Tensor, symbols: Any) -> str:
    return f"{canonical_shape(value, symbols)} {value.dtype} {value.device} {value.requires_grad}"


def split(capture: Capture, pre: Preamble, mixes: Callable[[Region], bool]) -> list[Region]:
    """The regions of a capture in order. ``mixes`` says whether a segment needs other tokens."""
    main = capture.main
    cuts = _waists(capture, main)
    bounds = [0, *cuts, len(main)]
    segments = [main[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    atoms = [make(capture, pre, s) for s in segments]
    keys = [a.key() for a in atoms]
    known: dict[str, bool] = {}
    for atom, key in zip(atoms, keys, strict=True):
        if key not in known:
            known[key] = mixes(atom)
    groups = _group(keys, [known[k] for k in keys])
    return [make(capture, pre, [n for i in g for n in segments[i]]) for g in groups]


def _group(keys: Sequence[str], mixing: Sequence[bool]) -> list[list[int]]:
    """Indices of segments per region; see the module's first paragraph."""
    if not any(mixing):
        # no mixing at all: every segment is its own region, equal ones share a program
        return [[i] for i in range(len(keys))]
    first, last = mixing.index(True), len(mixing) - 1 - mixing[::-1].index(True)
    groups = [[i] for i in range(first)]
    for i in range(first, last + 1):
        if mixing[i] or not groups or i == first:
            groups.append([i])
        else:
            groups[-1].append(i)
    body = Counter(keys[first : last + 1])
    tail = last + 1
    while tail < len(keys) - 1 and body[keys[tail]]:
        groups[-1].append(tail)
        tail += 1
    if tail < len(keys):
        groups.append(list(range(tail, len(keys))))
    return groups


def _waists(capture: Capture, main: list[fx.Node]) -> list[int]:
    """Positions ``p`` such that a region may end before ``main[p]``."""
    live = _live_bytes(capture, main)
    minima = [
        live[p] for p in range(1, len(main))
        if 0 < live[p] <= live[p - 1] and (p + 1 >= len(main) or live[p] <= live[p + 1]) and live[p] != live[p - 1]
    ]  # fmt: skip
    if not minima:
        return []
    counts = Counter(minima)
    often = max(2, 0.45 * max(counts.values()))
    # a single layer may have no repetition to go by: then the widest state that stands alone
    residual = min((v for v, c in counts.items() if c >= often), default=max(minima))
    cuts, previous = [], False
    for p in range(1, len(main)):
        here = residual * 0.95 <= live[p] <= residual * 1.05
        if here and not previous:
            cuts.append(p)
        previous = here
    return cuts


def _live_bytes(capture: Capture, main: list[fx.Node]) -> list[float]:
    """Bytes per token alive across the position before each node, values with the streamed axis only."""
    order = {n: i for i, n in enumerate(main)}
    delta = [0.0] * (len(main) + 1)
    outputs = {o for o in capture.outputs if isinstance(o, fx.Node)}
    for n in main:
        value = value_of(n)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        shape = capture.shape(n)
        if not any(has_axis(d) for d in shape):
            continue
        last = max((order[u] for u in n.users if u in order), default=-1)
        if n in outputs and not last > order[n]:
            continue
        size = per_token(shape) * value.dtype.itemsize
        if last > order[n]:
            delta[order[n] + 1] += size
            delta[last + 1 if last + 1 <= len(main) else len(main)] -= size
    live, total = [], 0.0
    for p in range(len(main)):
        total += delta[p]
        live.append(total)
    return live


def make(capture: Capture, pre: Preamble, nodes: list[fx.Node]) -> Region:
    """The region of consecutive main nodes ``nodes`` with its inputs and outputs."""
    inside = set(nodes)
    final = {o for o in capture.outputs if isinstance(o, fx.Node)}
    outputs = [n for n in nodes if n in final or any(u not in inside and u in capture.main_set for u in n.users)]
    external = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    sym_nodes, ints = _sym_closure(capture, external)
    tensors = [a for a in external if is_tensor(a) and a not in pre.cones]
    leaves = [_leaf(capture, pre, a) for a in tensors]
    values = [value_of(a) for a in tensors]
    cones, cone_args = [], []
    for a in external:
        if a in pre.cones:
            cone = pre.cones[a]
            ints = list(dict.fromkeys([*ints, *cone.ints]))
            args = []
            for leaf, value in zip(cone.leaves, cone.values, strict=True):
                if leaf not in leaves[len(tensors):]:
                    leaves.append(leaf)
                    values.append(value)
                args.append(len(tensors) + leaves[len(tensors):].index(leaf))
            cones.append((a, cone))
            cone_args.append(args)
    return Region(capture, [*sym_nodes, *nodes], outputs, ints, tensors, leaves, values, cones, cone_args)


def _leaf(capture: Capture, pre: Preamble, node: fx.Node) -> Leaf:
    if node in pre.narrow:
        return pre.narrow[node]
    return ("input" if node.op == "placeholder" else "main", node.name)


def _sym_closure(capture: Capture, external: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Integer nodes that a region repeats for itself, and the capture inputs they start from."""
    needed: set[fx.Node] = set()

    def visit(n: fx.Node) -> None:
        if n in needed or is_tensor(n):
            return
        needed.add(n)
        for a in n.all_input_nodes:
            visit(a)

    for a in external:
        visit(a)
    ordered = [n for n in capture.nodes if n in needed]
    return [n for n in ordered if n.op != "placeholder"], [n for n in ordered if n.op == "placeholder"]
