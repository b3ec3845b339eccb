"""One runner for every rewrite: of captured graphs, joint graphs, chunk bodies and programs.

It verifies after each pass, times it, counts what it changed, tells observers, and rations fuel.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, fx

from fxmem._compat.hooks import lazy_module
from fxmem.frontend.capture import Context, value_of
from fxmem.frontend.interpret import fake_call
from fxmem.frontend.joint import Joint
from fxmem.program.steps import Program
from fxmem.rewriting.fuel import fuel, fuelled
from fxmem.rewriting.text import changed, lines
from fxmem.rewriting.verify import Verifier

S = TypeVar("S", fx.GraphModule, Joint, fx.Graph, Program)


class Pass(Protocol[S]):
    """A rewrite that returns a new form of what it is given and leaves that alone."""

    @property
    def name(self) -> str: ...

    def run(self, subject: S, /) -> S: ...


Edit = Callable[[], object]
"""One change of the copy that a :class:`LocalPass` works on."""


class LocalPass(Generic[S]):
    """A pass of small edits, each right without the others; fuel counts them one by one."""

    __slots__ = ()

    def run(self, subject: S, /) -> S:
        if isinstance(subject, fx.GraphModule) and next(iter(self.edits(subject)), None) is None:
            return subject  # a copy of a whole model's graph costs more than to look twice
        new = copied(subject)
        tank = fuel()
        for edit in self.edits(new):
            if tank.take():
                edit()
        return new

    def edits(self, subject: S, /) -> Iterable[Edit]:
        """The edits of ``subject``, each found when those before it are done; looking for the first
        in a captured graph changes nothing.
        """
        raise NotImplementedError


class Required:
    """Marks a pass without which nothing behind it can read the graph; it takes no fuel."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Applied(Generic[S]):
    """One run of a pass: on what (``where``), from what to what, for how many seconds."""

    name: str
    where: str
    before: S
    after: S
    seconds: float

    @property
    def edits(self) -> int:
        """Nodes that are new, gone or changed."""
        return changed(lines(self.before), lines(self.after))

    def diff(self) -> str:
        """The change, as a unified diff of nodes."""
        old, new = lines(self.before), lines(self.after)
        return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm=""))

    def __str__(self) -> str:
        at = f" of {self.where}" if self.where else ""
        return f"{self.name}{at}: {self.edits} nodes changed, {self.seconds:.3f} s"


Observer = Callable[[Applied[Any]], object]
OBSERVERS: list[Observer] = []
"""Told of every run of every pass."""


def dump(applied: Applied[Any]) -> None:
    """Print the run and its result; on with ``FXMEM_DUMP=1``."""
    print(f"# {applied}", *lines(applied.after), sep="\n", file=sys.stderr)


def show_diff(applied: Applied[Any]) -> None:
    """Print the run and its diff where something changed; on with ``FXMEM_DIFF=1``."""
    if difference := applied.diff():
        print(f"# {applied}\n{difference}", file=sys.stderr)


_SWITCHES: dict[str, Observer] = {"FXMEM_DUMP": dump, "FXMEM_DIFF": show_diff}


def run_passes(passes: Sequence[Pass[S]], subject: S, where: str = "") -> S:
    """``subject`` after every pass; raises ``VerificationError`` at the first fault.

    ``where``: what it is a graph or program of. ``FXMEM_VERIFY=full`` in the environment: every
    node is evaluated again after every pass.
    """
    observers = [*OBSERVERS, *(f for name, f in _SWITCHES.items() if os.environ.get(name))]
    full = os.environ.get("FXMEM_VERIFY") == "full"
    before = Verifier.of(subject)
    for one in passes:
        start = time.perf_counter()
        with fuelled(None) if isinstance(one, Required) else contextlib.nullcontext():
            result = one.run(subject)
        seconds = time.perf_counter() - start
        after = before if result is subject else Verifier.of(result)
        before.check(one.name, after, full=full)
        whole = result is not subject and not isinstance(one, (LocalPass, Required))
        if whole and after.text != before.text and not fuel().take():
            result, after = subject, before
        for observe in observers:
            observe(Applied(one.name, where, subject, result, seconds))
        subject, before = result, after
    return subject


def copied(subject: S) -> S:
    """The same on a graph of its own, for a pass to edit."""
    if isinstance(subject, Joint):
        return subject.copy()
    if isinstance(subject, fx.GraphModule):
        return copy_graph(subject)
    assert isinstance(subject, fx.Graph), "a program's graphs are copied where they are edited"
    return copy_body(subject)


def copy_body(graph: fx.Graph) -> fx.Graph:
    """The same nodes in a graph of their own."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same module on a graph of its own, for a pass to edit."""
    return lazy_module(gm, copy_body(gm.graph))


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
