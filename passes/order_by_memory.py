"""Order by memory: the operators of a chunk body in an order in which less of it is alive at once.

Autograd's order is that of the formulas: what two terms of a sum read waits for the second one, and
an operator that could write over its operand comes before another reader of it. Here every operator
comes when its result is needed, and of its operands the one first whose making takes more than it
leaves (Sethi and Ullman, J. ACM 17(4), 1970). The new order is taken where it has the lower peak.

Calls that write keep their order, among each other and against readers of the body's arguments, of
which two may be the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from fxmem.axes.sizes import byte_count, evaluate
from fxmem.passes.in_place import overwritable
from fxmem.rewriting.aliases import memory_read, storages, written

_LENGTH = 256
"""Any size that differs from call to call, to compare bytes."""


@dataclass(frozen=True, slots=True)
class OrderByMemory:
    """Reorder the graph of a chunk body where that lowers its peak."""

    name: str = "order_by_memory"

    def run(self, graph: fx.Graph) -> fx.Graph:
        memory = _Memory(graph)
        before = list(graph.nodes)
        after = memory.ordered()
        if memory.peak(after) >= memory.peak(before):
            return graph
        new, known = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in after:
            known[node] = new.node_copy(node, known.__getitem__)
        return new


class _Memory:
    """``own``: bytes that a node makes; ``first``: what comes before a node whatever the order."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.root = storages(graph)
        self.own = {n: _bytes(n) if self.root.get(n) is n else 0 for n in self.nodes}
        self.first: dict[fx.Node, dict[fx.Node, None]] = {}
        self.roots: list[fx.Node] = []
        self._tell_order()

    def _tell_order(self) -> None:
        touched: dict[fx.Node | None, list[fx.Node]] = {}
        writers: dict[fx.Node | None, fx.Node] = {}
        for node in self.nodes:
            first = dict.fromkeys(node.all_input_nodes)
            writes = _memory(written(node))
            for memory in _memory(node.all_input_nodes) | writes:
                if memory in writes:
                    first.update(dict.fromkeys(touched.get(memory, ())))
                elif memory in writers:
                    first[writers[memory]] = None
            for memory in _memory(node.all_input_nodes) | writes:
                touched.setdefault(memory, []).append(node)
            for memory in writes:
                writers[memory] = node
            self.first[node] = first
            if writes or not node.users or node.op in ("placeholder", "output"):
                self.roots.append(node)

    def ordered(self) -> list[fx.Node]:
        """Roots as they were, and before each what it needs."""
        need = self._needs()
        at = {n: i for i, n in enumerate(self.nodes)}
        done: dict[fx.Node, None] = {}
        for root in self.roots:
            stack = [root]
            while stack:
                node = stack[-1]
                waiting = [n for n in self.first[node] if n not in done]
                # the last of the stack is next: what takes the most beyond what it leaves
                stack += sorted(waiting, key=lambda n: (need[n] - self.own[n], -at[n]))
                if not waiting:
                    done[stack.pop()] = None
        return list(done)

    def _needs(self) -> dict[fx.Node, int]:
        """Bytes that it takes to make each value, as if nothing had another reader."""
        need: dict[fx.Node, int] = {}
        for node in self.nodes:
            operands = node.all_input_nodes
            held = peak = 0
            for n in sorted(operands, key=lambda n: self.own[n] - need[n]):
                peak = max(peak, held + need[n])
                held += self.own[n]
            over = any(self.own[n] == self.own[node] for n in overwritable(node))
            need[node] = max(peak, held + (0 if over else self.own[node]))
        return need

    def peak(self, order: Sequence[fx.Node]) -> int:
        """Most bytes alive in this order, with the writes in place that it allows."""
        last: dict[fx.Node | None, fx.Node] = {}
        for node in order:
            for n in node.all_input_nodes:
                last[self.root.get(n)] = node
        alive: dict[fx.Node | None, int] = {}
        total = peak = 0
        for node in order:
            ending = [r for r in map(self.root.get, node.all_input_nodes) if last[r] is node]
            size = self.own[node]
            over = map(self.root.get, overwritable(node))
            spared = next((r for r in over if r in ending and alive.get(r) == size), None)
            if spared is not None:
                total -= alive.pop(spared)
            if size:
                alive[node] = size
                total += size
            peak = max(peak, total)
            if size and not node.users:
                total -= alive.pop(node)
            for r in ending:
                total -= alive.pop(r, 0)
        return peak


def _memory(values: Iterable[fx.Node]) -> set[fx.Node | None]:
    """Whose memory these are; None stands for all arguments."""
    return {None if n.op == "placeholder" else n for n in memory_read(values)}


def _bytes(node: fx.Node) -> int:
    info = node.meta.get("info")
    if info is None:
        return 0
    size = byte_count(info.shape, info.dtype)
    return int(evaluate(size, {str(s): _LENGTH for s in size.free_symbols}))
