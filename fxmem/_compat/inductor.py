"""Private names of torch that compiling a chunk body with Inductor needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    statically_known_true,
)

__all__ = ["Symbolic", "cache_counters", "compile_segment", "statically_known_true"]


@dataclass(frozen=True, slots=True)
class Symbolic:
    """Fake tensors over named sizes: ``ints`` by name, each an independent symbol that may take any
    value, 0 and 1 included.
    """

    mode: FakeTensorMode
    env: ShapeEnv
    ints: dict[str, torch.SymInt]
    names: dict[sympy.Symbol, sympy.Symbol]
    hints: dict[str, int]

    @classmethod
    def of(cls, hints: Mapping[str, int]) -> Symbolic:
        """``hints``: a typical value of each size, by which Inductor tunes loops."""
        env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        mode = FakeTensorMode(shape_env=env, static_shapes=False)
        new = cls(mode, env, {}, {}, {})
        for name, hint in hints.items():
            new.symbol(name, hint)
        return new

    def symbol(self, name: str, hint: int) -> torch.SymInt:
        """A size of its own."""
        source = ConstantSource(f"fxmem_{name}")
        made = self.env.create_symbol(
            hint, source, DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=True
        )
        self.ints[name] = self.env.create_symintnode(made, hint=hint, source=source)
        self.names[made] = sympy.Symbol(name, integer=True)
        self.hints[name] = hint
        return self.ints[name]

    def size(self, expr: sympy.Expr) -> int | torch.SymInt:
        """The size that an expression over the names stands for."""
        if expr.is_Integer:
            return int(expr)
        own = {str(n): s for s, n in self.names.items()}
        mine = expr.xreplace({s: own[str(s)] for s in expr.free_symbols})
        values = {own[n]: h for n, h in self.hints.items()}
        return self.env.create_symintnode(mine, hint=int(mine.xreplace(values)))

    def expr(self, value: int | torch.SymInt) -> sympy.Expr:
        """The expression over the names of a size."""
        return sympy.sympify(value).xreplace(self.names)

    def tensor(
        self, shape: Sequence[sympy.Expr], stride: Sequence[sympy.Expr], dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        with self.mode:
            return torch.empty_strided(
                [self.size(s) for s in shape], [self.size(s) for s in stride], dtype=dtype,
                device=device,
            )  # fmt: skip

    @contextlib.contextmanager
    def running(self) -> Any:
        """Fake execution without guards that a size differs from 1."""
        with symbolic_config.patch(backed_size_oblivious=True), self.mode, torch.no_grad():
            yield

    def guards(self) -> list[sympy.Expr]:
        """What tracing assumed about the sizes, over the names."""
        return [g.expr.xreplace(self.names) for g in self.env.guards]


def compile_segment(
    fn: Callable[..., Sequence[Tensor]], sizes: Symbolic, inputs: Sequence[Any],
    donated: Sequence[int] = (),
) -> Callable[[list[Any]], Sequence[Tensor]]:  # fmt: skip
    """``fn(*inputs)``, ATen calls on fake tensors and sizes, by Inductor.

    The result takes a list of arguments and empties it, so that an argument nobody else holds is
    freed at its last use. Results have the strides that ``fn`` gives them. ``donated``: positions
    of inputs that nobody reads afterwards, whose memory results may take.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    with sizes.running():
        gm = make_fx(fn, decomposition_table=select_decomp_table())(*inputs)
    _visible(gm)
    context = TracingContext(sizes.mode)
    if donated:
        _donate(gm, context, donated)
    with (
        symbolic_config.patch(backed_size_oblivious=True), tracing(context), torch.no_grad(),
        # callers check sizes and strides, once per set of sizes
        inductor_config.patch(size_asserts=False, alignment_asserts=False),
    ):  # fmt: skip
        return compile_fx_inner(
            gm, list(inputs), is_inference=not donated, is_backward=bool(donated)
        )


def _donate(gm: fx.GraphModule, context: TracingContext, donated: Sequence[int]) -> None:
    """Inductor lets a backward graph alone take its inputs' memory."""
    context.fw_metadata = SimpleNamespace(  # type: ignore[assignment]
        bw_donated_idxs=list(donated), static_input_indices=[], num_mutated_inp_runtime_indices=0
    )
    # the cache's key has the code of the graph, not what is donated
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if i in donated:
            node.name = node.target = f"donated_{i}"
    gm.recompile()


def _visible(gm: fx.GraphModule) -> None:
    """Keep the strides of every result."""
    (output,) = gm.graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))


def cache_counters() -> tuple[int, int]:
    """Hits and misses of Inductor's cache of compiled graphs, in this process."""
    found = counters["inductor"]
    return int(found["fxgraph_cache_hit"]), int(found["fxgraph_cache_miss"])
