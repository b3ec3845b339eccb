"""Which values of a forward a region may keep for its backward, in three levels.

A streamed backward makes every value of the forward again. Keeping one costs its bytes until the
backward, and saves the ops that are then not run again. Values are taken in the order of seconds
saved per byte, each given those before it:

| level | keeps |
|---|---|
| 0 | nothing: the backward begins from the region's inputs |
| 1 | results of ops that mix tokens, and states handed from chunk to chunk |
| 2 | as much as it takes that no product is made twice |
| 3 | everything whose keeping saves anything: what plain autograd saves, at most |

:mod:`fxmem.memory.budget` chooses a level per region and call, :mod:`fxmem.runtime.retention` which
regions have level 1 where no budget is given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from fxmem.axes.sizes import evaluate_shape, has_axis
from fxmem.frontend.joint import Joint
from fxmem.rules.movement import ROWS as MOVEMENT
from fxmem.streaming.costs import Rates, cost_of
from fxmem.streaming.labels import Kind, Label, analyse
from fxmem.streaming.schedule import backward_nodes, producer

PRODUCTS = Rates(flops=20.0, bytes=1000.0)
EVERYTHING = Rates(flops=20.0, bytes=1.0)
"""Operations that a device does while it moves a byte, about: on a CPU and a GPU alike. Only the
order of the values depends on it, and programs must not differ from machine to machine. Products
come first, whatever the width of the model."""
NAMES = ("inputs alone", "results of attention", "products of matrices", "all that saves time")
"""What each level keeps, in words."""
SIZES = {"T": 2048}


class _Forward:
    """The forward half of a joint graph: what it costs to make again what the backward reads."""

    def __init__(self, joint: Joint) -> None:
        self.joint, self.late = joint, backward_nodes(joint)
        names = {str(s) for e in joint.symbols.values() for s in e.free_symbols}
        self.sizes = {**dict.fromkeys(names, 1), **SIZES}
        self.roots = [
            a for n in joint.graph.nodes if n in self.late and n.op == "call_function"
            for a in n.all_input_nodes if a not in self.late
        ]  # fmt: skip

    def again(self, kept: Collection[fx.Node]) -> set[fx.Node]:
        """Ops that the backward runs again where these values are kept."""
        found: set[fx.Node] = set()
        work = [r for r in self.roots if r not in kept]
        while work:
            node = work.pop()
            if node not in found and node.op == "call_function":
                found.add(node)
                work += [a for a in node.all_input_nodes if a not in kept]
        return found

    def bytes(self, node: fx.Node) -> float:
        info, count = self.joint.info[node], 1.0
        for size in evaluate_shape(info.shape, self.sizes):
            count *= size
        return max(1.0, count * info.dtype.itemsize)

    def candidates(self) -> list[list[fx.Node]]:
        """Values that a loop cuts, each with the others that its op makes."""
        labels = analyse(self.joint, causal=True)
        again = self.again(())
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.joint.graph.nodes:
            info, label = self.joint.info.get(node), labels.label.get(node)
            if (
                info is not None
                and node in again
                and isinstance(label, Label)
                and label.kind is Kind.CUT
                and str(node.target) not in MOVEMENT
                and sum(has_axis(d) for d in info.shape) == 1
            ):
                groups.setdefault(producer(node), []).append(node)
        return list(groups.values())


def made_again(joint: Joint, kept: Collection[fx.Node]) -> set[fx.Node]:
    """Ops of the forward that a backward runs again where these values are kept."""
    return _Forward(joint).again(set(kept))


def levels(joint: Joint, first: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """What each level keeps, in the order of the graph; ``first``: level 1."""
    forward = _Forward(joint)
    groups = forward.candidates()
    second = _extend(forward, set(first), groups, PRODUCTS)
    third = _extend(forward, second, groups, EVERYTHING)
    inside = [list(first), *([n for n in joint.graph.nodes if n in s] for s in (second, third))]
    return [[], *inside]


def _extend(
    forward: _Forward, kept: set[fx.Node], groups: Sequence[list[fx.Node]], rates: Rates
) -> set[fx.Node]:
    """Keep more, the most seconds per byte first; for products, until none is left."""
    cost = {n: cost_of(forward.joint, [n], forward.sizes) for n in forward.again(kept)}
    price = {n: c.seconds(rates) for n, c in cost.items()}
    while True:
        again = forward.again(kept)
        if rates is PRODUCTS and not any(cost[n].flops for n in again):
            return kept
        now = sum(price[n] for n in again)
        gains = [
            (now - sum(price[n] for n in forward.again(kept | {*g}))) / sum(map(forward.bytes, g))
            if again & set(g) else 0.0
            for g in groups
        ]  # fmt: skip
        if not gains or max(gains) <= 0:
            return kept
        kept = kept | {*groups[gains.index(max(gains))]}


__all__ = ["NAMES", "levels", "made_again"]
