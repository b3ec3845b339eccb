"""What the programs take that ran on the outputs which a call has promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary, ref

from fxmem.compiler.step import CompiledGraph
from fxmem.memory.predict import Step


class LateWorking:
    """Called with the sizes of a call for the largest working set of those of ``recorded`` that
    last read a parameter of ``graph``, without the gradients that they make; 0 where there is none.

    A program's is that of the longest call so far: little of it depends on the length.
    """

    def __init__(
        self, graph: CompiledGraph, recorded: Callable[[], Sequence[CompiledGraph]]
    ) -> None:
        self._graph, self._recorded = ref(graph), recorded  # the graph keeps this
        self._known: WeakKeyDictionary[CompiledGraph, tuple[int, int]] = WeakKeyDictionary()

    def __call__(self, sizes: Mapping[str, int]) -> int:
        graph = self._graph()
        assert graph is not None, "it asks"
        own = {id(w) for w in graph.weights()}
        tokens = graph.chunker.tokens(sizes)
        return max(
            (
                self._of(g, tokens)
                for g in self._recorded()
                if any(id(w) in own for w in g.weights())
            ),
            default=0,
        )

    def _of(self, graph: CompiledGraph, tokens: int) -> int:
        longest, known = self._known.get(graph, (0, 0))
        if graph.sizes and not graph.selected and tokens > longest:
            length = graph.sizes.get("T", 1) * tokens // max(1, graph.chunker.tokens(graph.sizes))
            step = Step(graph, {**graph.sizes, "T": max(1, length)})
            known = max(0, step.predict().peak_bytes - step.gradient_bytes())
            self._known[graph] = tokens, known
        return known


__all__ = ["LateWorking"]
