"""Units of a model: the parameter slices that are kept or removed together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import networkx as nx
import torch

from fxmem.errors import MaskError

Path = tuple[tuple[str, int, int], ...]
Member = tuple[str, int, Path]


class Norm(NamedTuple):
    """A norm over the residual stream, which a smaller width rescales.

    ``parameter``: its weight; ``offset``: it multiplies by 1 + weight; ``module`` and ``attribute``
    hold ``eps``; ``eps`` and ``width`` (channels) are those of the dense model.
    """

    parameter: str
    offset: bool
    module: str
    attribute: str
    eps: float
    width: int


class Group(Protocol):
    """What a search needs of one group of coupled units (`fxmem.coupling`)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def cost(self) -> int: ...
    @property
    def consumer(self) -> tuple[Member, ...]: ...
    @property
    def members(self) -> tuple[Member, ...]: ...


@dataclass(frozen=True)
class UnitGroup:
    """One prunable dimension of the model.

    Attributes:
        name: module path and kind, ``"model.layers.3.mlp.mlp_channels"``.
        kind: ``"kv_groups"`` (key/value heads with their query heads), ``"mlp_channels"``,
            ``"channels"`` (of convolutions), ``"experts"`` (whole experts of one mixture) or
            ``"width"`` (channels of the residual stream).
        layer: first number in the module path, -1 if none.
        size: number of units. cost: parameters removed with one unit.
        members: ``(parameter, axis, path)`` slices; see :func:`positions`.
        consumer: members whose axis is contracted with the value the unit produces; for experts
            the weights that give their output.
        sizes: sizes that follow the unit count, as factors per unit (``size * factor``).
        norms: norms that average over the units, of a ``"width"`` group only.
        least: units that must stay: as many experts as one token chooses, one channel.
        router: members whose product gives the scores that experts are chosen by.
        buffers: slices of saved buffers, as members.
        unowned: consumers that are multiplied elsewhere than by a call of their module with its
            own input.
    """

    name: str
    kind: str
    layer: int
    size: int
    cost: int
    members: tuple[Member, ...]
    consumer: tuple[Member, ...]
    sizes: tuple[int, ...]
    norms: tuple[Norm, ...] = ()
    least: int = 0
    router: tuple[Member, ...] = ()
    buffers: tuple[Member, ...] = ()
    unowned: tuple[str, ...] = ()

    def __post_init__(self) -> None:  # read back from JSON they are plain tuples
        object.__setattr__(self, "norms", tuple(Norm(*n) for n in self.norms))


@dataclass(frozen=True)
class Coupling:
    """All unit groups of one model, and the axes that cannot be pruned with the reason."""

    groups: tuple[UnitGroup, ...]
    blocked: tuple[tuple[str, int, str], ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    item_sizes: tuple[tuple[str, int], ...] = ()
    """Bytes per element of every parameter."""
    products: tuple[tuple[str, float], ...] = ()
    """Parameters in products -> rows that each is multiplied with, in the call that was read."""
    buffers: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Shapes of the buffers that may be cut."""

    def group(self, name: str) -> UnitGroup:
        """The group of that name.

        Raises:
            MaskError: there is none.
        """
        for g in self.groups:
            if g.name == name:
                return g
        raise MaskError(f"the model has no unit group {name!r}")

    @property
    def left_out(self) -> dict[str, str]:
        """Matrices without a unit other than channels of the residual stream -> why.

        Those of all layers are one entry, with ``*`` for their numbers.
        """
        cut = {n for g in self.groups if g.kind != "width" for n, _, _ in g.members}
        whole = {n for n, shape in self.shapes if len(shape) > 1 and n not in cut}
        reasons: dict[str, dict[str, None]] = {}
        for name, _, why in self.blocked:
            if name in whole:
                role = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
                reasons.setdefault(role, {})[re.sub(r"\d+", "*", why)] = None
        return {role: "; ".join(found) for role, found in reasons.items()}

    @property
    def graph(self) -> Any:
        """Bipartite networkx graph: group names and the ``(parameter, axis)`` they slice."""
        graph = nx.Graph()
        for g in self.groups:
            graph.add_node(g.name, kind=g.kind, size=g.size)
            for name, axis, path in g.members:
                graph.add_edge(g.name, (name, axis), path=path)
        return graph

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups"]
        for g in self.groups:
            lines.append(f"{g.name}: {g.size} units of {g.cost:,} parameters")
            lines += [
                f"  {name} axis {axis} {'/'.join(f'{k}({a},{b})' for k, a, b in path)}"
                for name, axis, path in g.members
            ]
        lines += [f"blocked: {name} axis {axis}: {why}" for name, axis, why in self.blocked]
        return "\n".join(lines)

    def draw(self, path: str) -> None:
        """Write a picture of :attr:`graph` to ``path`` (PNG, SVG or PDF by suffix)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, max(4, len(self.groups))))
        axes = figure.add_subplot()
        graph = self.graph
        where = nx.bipartite_layout(graph, [g.name for g in self.groups])
        label = {n: n if isinstance(n, str) else f"{n[0]}[{n[1]}]" for n in graph}
        nx.draw_networkx(graph, where, ax=axes, labels=label, font_size=6, node_size=40)
        figure.savefig(path)


def unit_of(length: int, path: Path, size: int) -> torch.Tensor:
    """The unit of each position of an axis, int (length,); `size` where it belongs to none.

    Steps narrow an index range: ``segment(offset, n)``, ``inner(outer size)`` views it ``(outer,
    n)`` and keeps columns, ``outer(inner size)`` views it ``(n, inner)`` and keeps rows.
    """
    index, before, after = torch.arange(length), 1, 1
    for kind, a, b in path:
        if kind == "segment":
            index = index[a : a + b]
        elif kind == "inner":
            before = a
        else:
            after = a
    owner = torch.full((length,), size)
    owner[index] = torch.arange(size).view(1, size, 1).expand(before, size, after).reshape(-1)
    return owner


def positions(length: int, path: Path, size: int, kept: tuple[int, ...]) -> torch.Tensor:
    """Boolean ``[length]``: positions of an axis that stay when ``kept`` of ``size`` units do."""
    stays = torch.zeros(size + 1, dtype=torch.bool)
    stays[[*kept, size]] = True
    return stays[unit_of(length, path, size)]


def cost_of(members: tuple[Member, ...], shapes: dict[str, tuple[int, ...]], size: int) -> int:
    """Parameters that one unit removes."""
    total = 0
    for name, axis, path in members:
        shape = shapes[name]
        if not size:
            continue
        n = int((~positions(shape[axis], path, size, tuple(range(1, size)))).sum())
        total += n * prod(shape[:axis]) * prod(shape[axis + 1 :])
    return total
