"""What is done with a deferred output: a graph of calls, each with a fake of its result.

A node is one call. Calls that write in place are nodes as well; what a value is at some moment
needs the node that made it and every writer, so far, of a tensor that shares its memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxmem._compat import graph as _compat
from fxmem._compat.overrides import autocasts, tree_leaves, tree_map, version
from fxmem.frontend.capture import Context
from fxmem.frontend.dropped_outputs import KEEP_PER_TOKEN
from fxmem.frontend.late_outputs import Random, Watch
from fxmem.frontend.origin import Line, calling_line

_ORDER = itertools.count()
MODE = _compat.FakeTensorMode(allow_non_fake_inputs=False)
"""Sizes are those of the call; only what is computed is not."""


@dataclass(eq=False, slots=True)
class Memory:
    """What tensors that are views of each other share: the nodes that have written to it."""

    writers: list[Node] = field(default_factory=list)
    given: bool = False
    """Some of its tensors have been computed, so the others no longer see what is written."""


@dataclass(eq=False, slots=True)
class Node:
    """One call: ``target`` is a function, or the name of a method or attribute (``form``).

    ``args`` and ``kwargs`` hold nodes and tensors from outside. ``rows``: tokens of the output that
    it stems from. ``heads``: the deferred outputs that it depends on.
    """

    form: str
    target: Any
    args: Any
    kwargs: Any
    context: Context
    fake: Any
    memory: Memory
    rows: int = 0
    heads: frozenset[Any] = frozenset()
    sources: tuple[Tensor, ...] = ()
    """Tensors from outside that its gradient goes to."""
    writers: tuple[Node, ...] = ()
    """Those of its operands' memory, as it was called."""
    real: Any = None
    order: int = field(default_factory=lambda: next(_ORDER))
    line: Line | None = None
    """Of the program that made the call."""
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors from outside, as they were."""

    def know(self, real: Tensor) -> None:
        """Its values, in place of the way to them."""
        self.real, self.memory.given = real, True
        self.args, self.kwargs, self.writers, self.versions = (), {}, (), []

    def operands(self) -> Iterable[Any]:
        return tree_leaves((self.args, self.kwargs))

    @property
    def wide(self) -> bool:
        """Larger than a few numbers per token."""
        return bool(self.fake.numel() > KEEP_PER_TOKEN * self.rows)


class Unknown(Exception):
    """The call cannot be recorded."""


def context() -> Context:
    """Grad mode and autocast as they are now."""
    return Context(torch.is_grad_enabled(), autocasts())


def fake_of(value: Any) -> Any:
    """A tensor without values; what is no tensor stays as it is."""
    if isinstance(value, Node):
        return value.fake
    if not isinstance(value, Tensor):
        return value
    with MODE, torch.enable_grad():
        made = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        return made.requires_grad_().view_as(made) if value.requires_grad else made


def probe(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[Node]]:
    """The call on fakes: its result, and the nodes that it writes to.

    Raises:
        Unknown: it needs values, draws random numbers, or writes to a tensor from outside.
    """
    leaves = tree_leaves((args, kwargs))
    fakes = {id(v): fake_of(v) for v in leaves if isinstance(v, (Node, Tensor))}
    before = {k: version(f) for k, f in fakes.items()}
    own = tree_map(lambda v: fakes.get(id(v), v), (args, kwargs))
    try:
        with MODE, Watch():
            result = func(*own[0], **own[1])
    except (Random, RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise Unknown(str(error)) from error
    written = [v for v in leaves if id(v) in fakes and version(fakes[id(v)]) != before[id(v)]]
    if not all(isinstance(v, Node) for v in written):
        raise Unknown("it writes to a tensor of the caller's")
    return result, written


def record(
    form: str, target: Any, args: Any, kwargs: Any, fake: Tensor, written: list[Node]
) -> Node:
    """A new node for one tensor that a call has returned."""
    leaves = tree_leaves((args, kwargs))
    nodes = [v for v in leaves if isinstance(v, Node)]
    key = _compat.storage_key(fake)
    shared = [n.memory for n in nodes if _compat.storage_key(n.fake) == key]
    writers = dict.fromkeys(w for n in nodes for w in n.memory.writers)
    sources = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
    sources += [s for n in (*nodes, *writers) for s in n.sources]
    made = Node(
        form, target, args, kwargs, context(), fake, shared[0] if shared else Memory(),
        max((n.rows for n in nodes), default=0),
        frozenset().union(*(n.heads for n in nodes)),
        tuple({id(s): s for s in sources}.values()), tuple(writers),
        line=calling_line(), versions=[(v, version(v)) for v in leaves if isinstance(v, Tensor)],
    )  # fmt: skip
    for n in written:
        n.memory.writers.append(made)
    return made


def needed(roots: Iterable[Node]) -> list[Node]:
    """Every call that the present values of ``roots`` need, in order; what is known ends it."""
    found: dict[Node, None] = {}
    stack = [w for r in roots for w in (r, *r.memory.writers)]
    while stack:
        node = stack.pop()
        if node in found or node.real is not None:
            continue
        found[node] = None
        stack += [n for n in (*node.operands(), *node.writers) if isinstance(n, Node)]
    return sorted(found, key=lambda n: n.order)


def sources(root: Node) -> tuple[Tensor, ...]:
    """Tensors that the values of ``root`` are computed from now and a gradient goes to."""
    nodes = needed([root])
    operands = [v for n in nodes for v in n.operands()]
    values = [v.real if isinstance(v, Node) else v for v in operands]
    found = {id(v): v for v in values if isinstance(v, Tensor) and v.requires_grad}
    return tuple(found.values())
