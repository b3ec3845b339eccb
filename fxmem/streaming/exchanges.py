"""Where ranks that stream parts of one sequence exchange values, while a program is made.

Of a value that is cut along the sequence a rank has the rows of its own chunks. What reads it in
another way (attention its keys, an op that runs whole) gets it gathered. A sum over chunks is at
first the sum over a rank's chunks: it is summed over ranks right after its loop, and where it has
the sequence itself (gradients of keys), a rank keeps its rows alone. All this is once per program,
whatever the number of chunks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from fxmem.axes.signature import Cut, TensorInfo
from fxmem.axes.sizes import ZERO, Size, T, has_axis, same
from fxmem.frontend.joint import Joint
from fxmem.program.steps import Exchange
from fxmem.streaming.loop_body import gathered


def rows_of(shape: Sequence[Size]) -> Cut | None:
    """Where a value that passes from one region to another has its rows; None: it passes whole."""
    at = [i for i, d in enumerate(shape) if has_axis(d)]
    return Cut(at[0], T) if len(at) == 1 and same(shape[at[0]], T) else None


Form = tuple[fx.Node, bool]
"""A result, and whether it leaves as this rank's rows alone."""


def forms_of(
    wanted: Sequence[fx.Node | None], grads: int, own: Sequence[bool] | None
) -> list[Form | None]:
    """The results of a region: what passes to other regions or to its backward, and from position
    ``grads`` on gradients of its tensors, which leave as the tensors came. ``own``: which of these
    came as rows; None: there are no other ranks.
    """
    rows = [own is not None] * grads + list(own or [False] * (len(wanted) - grads))
    return [None if n is None else (n, r) for n, r in zip(wanted, rows[: len(wanted)], strict=True)]


def given_as_rows(
    joint: Joint, held: Sequence[fx.Node], own: Sequence[bool] | None
) -> list[fx.Node] | None:
    """Inputs of a program that come as this rank's rows, where their shapes have rows."""
    if own is None:
        return None
    tangents = [t for t in joint.tangents if t is not None]
    return [*(n for n, o in zip(joint.inputs, own, strict=True) if o), *tangents, *held]


class Exchanges:
    """Of one program. ``local``: values of which a rank has its rows; ``names``: of all values."""

    def __init__(self, joint: Joint, names: dict[fx.Node, str]) -> None:
        self.joint, self.names = joint, names
        self.local: dict[fx.Node, Cut] = {}
        self.shapes: dict[str, TensorInfo] = {}
        self._whole: set[fx.Node] = set()

    def enter(self, nodes: Collection[fx.Node]) -> None:
        """These are given as the rank's rows."""
        for node in nodes:
            if cut := rows_of(self.joint.info[node].shape):
                self.local[node] = cut

    def keeps(self, node: fx.Node, cut: Cut) -> bool:
        """A buffer for chunks under ``cut`` has the rank's rows alone. Others, of rows that are
        moved along the sequence, are whole, with zeros elsewhere, and summed."""
        if plain := same(cut.offset, ZERO) and same(cut.length, T):
            self.local[node] = cut
        return plain

    def before(self, read: Collection[fx.Node]) -> list[Exchange]:
        """For a step that reads these whole."""
        nodes = [n for n in read if n not in self._whole]
        self._whole.update(nodes)
        return self._exchange("gather", nodes, [gathered(self.names[n]) for n in nodes])

    def after(self, made: Sequence[fx.Node]) -> list[Exchange]:
        """For a loop that has added up these over a rank's chunks."""
        cuts = {n: rows_of(self.joint.info[n].shape) for n in made}
        streams = [n for n in made if cuts[n]]
        rest = [n for n in made if not cuts[n]]
        out = self._exchange("sum", rest, [self.names[n] for n in rest])
        self.local.update({n: c for n, c in cuts.items() if c})
        out += self._exchange("scatter", streams, [f"{self.names[n]}_rows" for n in streams])
        self.names.update({n: f"{self.names[n]}_rows" for n in streams})
        return out

    def output(self, node: fx.Node, rows: bool) -> tuple[str, list[Exchange]]:
        """The name of a result as it leaves: the rank's ``rows`` of it, or whole."""
        own = self.local.get(node)
        cut = rows_of(self.joint.info[node].shape) if rows else None
        if own == cut:
            return self.names[node], []
        steps = self.before([node]) if own else []
        whole = gathered(self.names[node]) if own else self.names[node]
        if cut is None:
            return whole, steps
        info = self.joint.info[node]
        name = f"{whole}_own"
        self.shapes[name] = info
        return name, [*steps, Exchange("rows", [whole], [name], [cut], [info.shape])]

    def _exchange(self, kind: Any, nodes: list[fx.Node], results: list[str]) -> list[Exchange]:
        infos = [self.joint.info[n] for n in nodes]
        self.shapes.update(zip(results, infos, strict=True))
        cuts = [self.local.get(n) or rows_of(i.shape) for n, i in zip(nodes, infos, strict=True)]
        shapes = [i.shape for i in infos]
        given = [self.names[n] for n in nodes]
        return [Exchange(kind, given, results, cuts, shapes)] if nodes else []
