"""Run a tuple of passes, verified after each; observers may time, diff or dump."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import fx

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
    """``graph`` after every pass; raises :class:`~fxmem.verify.VerifyError` at the first fault.

    ``observers``: the default is :func:`dump` where ``FXMEM_DUMP`` is set.
    """
    if observers is None:
        observers = (dump,) if os.environ.get("FXMEM_DUMP") else ()
    for one in passes:
        verifier = Verifier.of(graph)
        start = time.perf_counter()
        result = one.run(graph)
        seconds = time.perf_counter() - start
        verifier.check(one.name, result)
        for observe in observers:
            observe(one.name, graph, result, seconds)
        graph = result
    return graph


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same module on a graph of its own, for a pass to edit."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)
