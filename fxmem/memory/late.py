"""What the programs take that ran on the outputs which a call has promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary, ref

from fxmem.compiler.step import CompiledGraph
from fxmem.memory.predict import predict


class LateWorking:
    """Called with the sizes of a call for the largest working set of those of ``recorded`` that
    last read a parameter of ``graph``, without the gradients that they make; 0 where there is none.

    It is replayed at the sizes of the longest call so far, since those of a program may depend on
    one another.
    """

    def __init__(
        self, graph: CompiledGraph, recorded: Callable[[], Sequence[CompiledGraph]]
    ) -> None:
        self._graph, self._recorded = ref(graph), recorded  # the graph keeps this
        self._known: WeakKeyDictionary[CompiledGraph, tuple[int, int, int]] = WeakKeyDictionary()

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
        if not graph.sizes or graph.selected:
            return 0
        longest, known, chunk = self._known.get(graph, (0, 0, 0))
        if graph.chunker.tokens(graph.sizes) > longest:
            found = predict(graph, graph.sizes)
            longest = graph.chunker.tokens(graph.sizes)
            known = max(0, found.peak_bytes - found.parameter_gradient_bytes)
            chunk = max((graph.chunk(i) for i in range(len(graph.calls))), default=0)
            self._known[graph] = longest, known, chunk
        # a longer call has longer chunks only where the longest so far was shorter than one
        return round(known * max(1.0, min(tokens, chunk) / max(1, longest)))


__all__ = ["LateWorking"]
