"""Where to cut a model: regions between two narrow waists of the graph.

Walk the main nodes in order and look at the bytes per token of the values alive across each
position. At a *waist* a single state is alive (the residual stream): the smallest value that occurs
again and again. Waists split the graph into *segments*. A segment that mixes tokens (attention)
starts a region and takes the token-local segments after it along, up to the next mixing one; what
precedes the first mixing segment (the embedding) and what follows the last one without a
counterpart elsewhere (final norm, LM head, loss) are regions of their own. Values that merely pass
by a region are not its inputs. The layers of a part that has a length of its own (an encoder, or
the decoder that reads it) are found in the same way, by the states that have that length.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxmem._compat.graph import OpOverload
from fxmem.frontend.capture import (
    Capture,
    Graph,
    canonical,
    canonical_shape,
    is_border,
    is_number,
    is_size,
    is_tensor,
    value_of,
)
from fxmem.frontend.interpret import attribute, call_node, run
from fxmem.frontend.origin import module_calls, module_path
from fxmem.frontend.parameter_free import Cone, Leaf, Parts, Preamble, leaf_of
from fxmem.frontend.subgraph import Body, Subgraph
from fxmem.frontend.waists import along, changes, waists

HERE = "<here>"
OWN_OPS = ("aten", "prims", "prim", "fxmem")
OWN_FUNCTIONS = ("torch", "_operator", "math", "builtins", "fxmem")


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
    cones: list[tuple[fx.Node, Cone | Parts]]
    cone_args: list[list[int]]
    _key: str = field(default="", init=False, compare=False, repr=False)

    @property
    def needs_grad(self) -> list[bool]:
        """Which tensor inputs want a gradient."""
        return [bool(v.requires_grad) for v in self.values]

    @property
    def modules(self) -> str:
        """Paths of the modules that it comes from, first and last; empty where none is known."""
        paths = list(dict.fromkeys(p for n in self.nodes if (p := module_path(n))))
        return " .. ".join(dict.fromkeys((*paths[:1], *paths[-1:])))

    @property
    def calls(self) -> dict[tuple[str, int], bool]:
        """The calls of modules that it is a part of, in order, by path and number; and whether what
        they are given here wants a gradient.
        """
        found: dict[tuple[str, int], bool] = {}
        known: dict[fx.Node, list[tuple[str, int]]] = {}

        def of(node: fx.Node) -> list[tuple[str, int]]:
            return known[node] if node in known else known.setdefault(node, module_calls(node))

        for n in self.nodes:
            given = [
                x for x in n.all_input_nodes
                if x not in self.capture.parameters and is_tensor(x) and value_of(x).requires_grad
            ]  # fmt: skip
            outside = [of(x) for x in given]
            for call in of(n):
                found[call] = found.get(call, False) or any(call not in c for c in outside)
        return found

    @property
    def parameter_mask(self) -> list[bool]:
        names = self.capture.parameter_names
        return [kind == "input" and name in names for kind, name, *_ in self.leaves]

    def function(
        self, call: Callable[[fx.Node, Any, Any], Any] = call_node
    ) -> Callable[..., list[Any]]:
        """``fn(*ints, *tensors) -> outputs``; ``call`` replaces single ops (canonicalisation)."""

        def fn(*values: Any) -> list[Any]:
            k = len(self.ints)
            env: dict[fx.Node, Any] = self._every_size(values[:k])
            tensors = values[k:]
            env.update(zip(self.inputs, tensors, strict=False))
            for (node, cone), args in zip(self.cones, self.cone_args, strict=True):
                ints = [env[i] for i in cone.ints]
                env[node] = cone(*ints, *(tensors[i] for i in args))
            run(self.nodes, env, self.capture, call)
            return [env[n] for n in self.outputs]

        return fn

    def _every_size(self, given: Sequence[Any]) -> dict[fx.Node, Any]:
        """What ``given`` has for ``ints``, for every input that is one of these sizes."""
        values = dict(zip(map(self._size, self.ints), given, strict=True))
        return {n: values[name] for n in self.capture.sizes if (name := self._size(n)) in values}

    def _size(self, node: fx.Node) -> str:
        return str(canonical(value_of(node), self.capture.symbols))

    def key(self) -> str:
        """Structural identity: equal keys run the same program on other weights."""
        self._key = self._key or hashlib.sha256(self.described().encode()).hexdigest()
        return self._key

    def described(self) -> str:
        """What the key stands for. What only this process knows stands behind :data:`HERE`."""
        index: dict[fx.Node, str] = self._every_size([f"i{i}" for i in range(len(self.ints))])
        symbols = self.capture.symbols
        lines = [f"int {canonical(value_of(n), symbols)}" for n in self.ints]
        for leaf_value, parameter in zip(self.values, self.parameter_mask, strict=True):
            lines.append(f"in {_describe(leaf_value, symbols)} {parameter}")
        for i, n in enumerate(self.inputs):
            index[n] = f"t{i}"
        for i, ((node, cone), args) in enumerate(zip(self.cones, self.cone_args, strict=True)):
            index[node] = f"c{i}"
            lines.append(f"cone {[index[i] for i in cone.ints]} {args} {cone.key}")
        lines += _lines(self.nodes, index, self.capture, symbols)
        # a capture without gradients has the same calls
        lines.append(f"out {[(index[n], value_of(n).requires_grad) for n in self.outputs]}")
        return "\n".join(lines)


def _lines(
    nodes: Sequence[fx.Node], index: dict[fx.Node, str], graph: Graph, symbols: Any
) -> list[str]:
    """One line per node, the same for nodes that do the same; adds their names to ``index``."""
    lines = []
    for i, n in enumerate(nodes):
        index.setdefault(n, f"v{i}")
        if is_size(value_of(n)):
            lines.append(f"{index[n]} = {_sizes(value_of(n), symbols)}")
            continue
        args = fx.map_arg((n.args, n.kwargs), lambda a: _Name(index[a]))
        target = _target(n, graph, symbols)
        lines.append(f"{index[n]} = {target} {args} {graph.contexts[n]}")
    return lines


def _sizes(value: Any, symbols: Any) -> str:
    if isinstance(value, (tuple, list)):
        return str([_sizes(v, symbols) for v in value])
    return str(canonical(value, symbols))


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _target(node: fx.Node, graph: Graph, symbols: Any) -> str:
    """What the node calls. A name alone may stand for several functions: the object counts."""
    t = node.target
    if isinstance(t, Subgraph):
        return f"{type(t).__name__} {t.options} {[_body(b, symbols) for b in t.bodies]}"
    if isinstance(t, str):
        return f"{t} {HERE} {id(attribute(graph.gm, t))}" if node.op == "get_attr" else t
    return _named(t)


def _named(target: Any) -> str:
    """A function of torch, Python or fxmem by its name; others may change under theirs."""
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", target)
    text = f"{module}.{name}"
    if isinstance(target, OpOverload):
        own = target.namespace in OWN_OPS
    else:
        own = str(module).partition(".")[0] in OWN_FUNCTIONS and _is_found(target)
    return text if own else f"{text} {HERE} {hash(target)}"


@functools.lru_cache(maxsize=4096)
def _is_found(target: Any) -> bool:
    """Its name leads to it."""
    try:
        return pickle.loads(pickle.dumps(target)) is target
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return False


def _body(body: Body, symbols: Any) -> str:
    index = {n: f"a{i}" for i, n in enumerate(body.inputs)}
    lines = _lines(body.nodes, index, body, symbols)
    result = fx.map_arg(body.result, lambda a: _Name(index[a]))
    return "\n".join([*lines, f"out {result}"])


def _describe(value: torch.Tensor, symbols: Any) -> str:
    return f"{canonical_shape(value, symbols)} {value.dtype} {value.device} {value.requires_grad}"


def split(
    capture: Capture, pre: Preamble, mixes: Callable[[Region], bool], *, one_length: bool = False,
    owners: Mapping[str, int] | None = None,
) -> tuple[list[Region], list[list[fx.Node]]]:  # fmt: skip
    """The regions of a capture in order, and what runs between them: the nodes before each region,
    then those after the last. ``mixes`` says whether a segment needs other tokens. Each region
    streams along the length that most of its values have; ``one_length``: all along the same.
    ``owners``: of a capture without a length, which has no waists, the group of each parameter by
    its name; it is cut where the group changes, so that groups open and close as on other ranks.
    """

    def of(nodes: list[fx.Node]) -> Region:
        return make(capture if one_length else along(capture, nodes), pre, nodes)

    main = capture.main
    borders_ = {p for p, n in enumerate(main) if is_border(n)}
    own = {*borders_, *(p + 1 for p in borders_)}
    found = waists(capture, main) if owners is None else changes(main, owners)
    cuts = sorted({*found, *own} - {0, len(main)})
    bounds = [0, *cuts, len(main)]
    segments = [main[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    between = [is_border(s[0]) for s in segments]
    atoms = [None if b else of(s) for s, b in zip(segments, between, strict=True)]
    keys = ["" if a is None else a.key() for a in atoms]
    known: dict[str, bool] = {"": False}
    for atom, key in zip(atoms, keys, strict=True):
        if atom is not None and key not in known:
            known[key] = owners is None and len(atoms) > 1 and mixes(atom)
    regions: list[Region] = []
    borders: list[list[fx.Node]] = [[]]
    for group in _group(keys, [known[k] for k in keys]):
        for hook, run_ in itertools.groupby(group, key=lambda i: between[i]):
            at = list(run_)
            nodes = [n for i in at for n in segments[i]]
            if hook:
                borders[-1] += nodes
                continue
            same = atoms[at[0]] if len(at) == 1 else None
            regions.append(same or of(nodes))
            borders.append([])
    return regions, borders


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


def make(capture: Capture, pre: Preamble, nodes: list[fx.Node]) -> Region:
    """The region of consecutive main nodes ``nodes`` with its inputs and outputs."""
    inside = set(nodes)
    final = {o for o in capture.outputs if isinstance(o, fx.Node)}
    outputs = [
        n for n in nodes
        if is_tensor(n)
        and (n in final or any(u not in inside and u in capture.main_set for u in _readers(n)))
    ]  # fmt: skip
    external = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    ints = _ints(capture)
    scalars = [a for a in external if not is_tensor(a) and a not in ints]
    tensors = [a for a in external if is_tensor(a) and a not in pre.cones]
    leaves = [leaf_of(pre, a) for a in tensors]
    values = [value_of(a) for a in tensors]
    cones, cone_args = [], []
    for a in external:
        if a in pre.cones:
            cone = pre.cones[a]
            args = []
            for leaf, value in zip(cone.leaves, cone.values, strict=True):
                if leaf not in leaves[len(tensors) :]:
                    leaves.append(leaf)
                    values.append(value)
                args.append(len(tensors) + leaves[len(tensors) :].index(leaf))
            cones.append((a, cone))
            cone_args.append(args)
    return Region(
        capture,
        [*_closure(capture, scalars), *nodes],
        outputs,
        ints,
        tensors,
        leaves,
        values,
        cones,
        cone_args,
    )


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Users; whoever asks for a number that values decide makes it of the values."""
    for user in node.users:
        yield user
        if is_number(user):
            yield from _readers(user)


def _ints(capture: Capture) -> list[fx.Node]:
    """One input for each size that varies, in order of their names."""
    found: dict[str, fx.Node] = {}
    for n in capture.sizes:
        value = value_of(n)
        if value.node.expr.free_symbols <= capture.symbols.keys():
            found.setdefault(str(canonical(value, capture.symbols)), n)
    return [found[name] for name in sorted(found)]


def _closure(capture: Capture, scalars: list[fx.Node]) -> list[fx.Node]:
    """Scalar nodes that a region repeats for itself, with what they are computed from, in order."""
    needed: set[fx.Node] = set()

    def visit(n: fx.Node) -> None:
        if n not in needed and n.op != "placeholder" and not is_tensor(n):
            needed.add(n)
            if not is_size(value_of(n)):
                for a in n.all_input_nodes:
                    visit(a)

    for a in scalars:
        visit(a)
    return [n for n in capture.nodes if n in needed] if needed else []
