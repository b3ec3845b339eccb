"""Run a tuple of passes, verified after each; observers may time, diff or dump."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, fx

from fxmem.capture import Context, fake_call, value_of
from fxmem.joint import Joint
from fxmem.verify import Program, Verifier

G = TypeVar("G", fx.GraphModule, Joint)


class Pass(Protocol[G]):
    """A rewrite that returns a new graph and leaves the one it is given alone."""

    @property
    def name(self) -> str: ...

    def run(self, graph: G, /) -> G: ...


class Observer(Protocol):
    """Told of each pass: its name, the graph before and after, and its seconds."""

    def __call__(self, name: str, before: Program, after: Program, seconds: float, /) -> None: ...


def dump(name: str, before: Program, after: Program, seconds: float, /) -> None:
    """Print the pass's time and its result; on with ``FXMEM_DUMP=1``."""
    print(f"# {name}: {seconds:.3f} s\n{after.graph}", file=sys.stderr)


def run_passes(
    passes: Sequence[Pass[G]], graph: G, observers: Sequence[Observer] | None = None
) -> G:
    """``graph`` after every pass; raises ``VerificationError`` at the first fault.

    ``FXMEM_VERIFY=full`` in the environment: every node is evaluated again after every pass.
    ``observers``: the default is :func:`dump` where ``FXMEM_DUMP`` is set.
    """
    if observers is None:
        observers = (dump,) if os.environ.get("FXMEM_DUMP") else ()
    full = os.environ.get("FXMEM_VERIFY") == "full"
    for one in passes:
        verifier = Verifier.of(graph)
        start = time.perf_counter()
        result = one.run(graph)
        seconds = time.perf_counter() - start
        verifier.check(one.name, result, full=full)
        for observe in observers:
            observe(one.name, graph, result, seconds)
        graph = result
    return graph


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same module on a graph of its own, for a pass to edit."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def call_before(
    at: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *,
    like: fx.Node, context: Context | None = None,
) -> fx.Node:  # fmt: skip
    """A call of a function, or of a method where ``target`` is a name, before ``at``, with the
    origin of ``like`` and its value under ``context``.
    """
    kind = "call_method" if isinstance(target, str) else "call_function"
    with at.graph.inserting_before(at):
        new = at.graph.create_node(kind, target, args, dict(kwargs or {}))
    new.meta = {k: v for k, v in like.meta.items() if k not in ("example_value", "val")}
    grad = isinstance(value := value_of(like), Tensor) and value.requires_grad
    with (context or Context()).enter():
        new.meta["example_value"] = fake_call(new, grad)
    return new
