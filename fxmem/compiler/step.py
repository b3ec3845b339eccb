"""A captured function in compiled form: what one call of it runs."""

from __future__ import annotations

import weakref
from collections import Counter as Tally
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat import wrapped
from fxmem.axes.sizes import evaluate
from fxmem.compiler.borders import Borders
from fxmem.compiler.late_bytes import LateBytes, late_bytes
from fxmem.compiler.region_codes import _adapted, save_codes
from fxmem.compiler.tied_weights import _link_shared
from fxmem.compiler.together import Together
from fxmem.distributed.sequence import Call
from fxmem.errors import InternalError
from fxmem.frontend import capture as cap
from fxmem.frontend import faults
from fxmem.frontend import parameter_free as pre_
from fxmem.frontend.dropped_outputs import Dropped, dropped
from fxmem.frontend.late_outputs import Late
from fxmem.plan.plan import Plan
from fxmem.roles.autograd import RoleRun, Step, run_selected
from fxmem.roles.roles import RoleSource, RoleTable
from fxmem.roles.variants import Selection, select
from fxmem.runtime.autograd import Run, run_region
from fxmem.runtime.loops import CallState
from fxmem.runtime.offload import Leaving, home
from fxmem.runtime.region_call import RegionCall
from fxmem.runtime.retention import Holding, Kept, Moment, Retention
from fxmem.runtime.sharding import NotStreamedError, current
from fxmem.streaming.chunk_size import Chunker
from fxmem.streaming.shards import WHOLE

LateOutput = Callable[[Late, Sequence[Any], dict[str, int]], Any]


class CompiledGraph:
    """Callable with the flat arguments of the Dynamo graph.

    ``part``: it is what is done with a deferred output.
    """

    def __init__(
        self,
        capture: cap.Capture,
        pre: pre_.Preamble,
        calls: list[RegionCall],
        plan: Plan,
        chunker: Chunker,
        plain: fx.GraphModule,
        borders: Borders,
        roles: RoleSource | None = None,
        late: LateOutput | None = None,
        part: bool = False,
        together: Together | None = None,
    ) -> None:
        self.late, self.part, self.together = late, part, together
        self.roles, self.borders = roles, borders
        self.selected: list[Selection] = []
        self.table: RoleTable | None = None
        self._first_use: dict[str, int] | None = None
        self.capture, self.pre, self.calls, self.plan = capture, pre, calls, plan
        self.chunker, self.plain = chunker, plain
        self.whole_calls = self._calls = 0
        # Now: Dynamo takes the origins of inputs away after the compilation.
        self._parameters = [
            (i, _compat.input_name(n))
            for i, n in enumerate(capture.inputs)
            if n in capture.parameters
        ]
        # a copy of what is written is there for the backward, as it was
        self._written: set[pre_.Leaf] = {("input", n.name) for n in capture.written}
        _link_shared(calls)
        self._late = [o for o in capture.outputs if isinstance(o, Late)]
        self._plan_releases()
        self.sizes: dict[str, int] = {}
        self._weights: list[weakref.ref[Tensor]] = []
        self.late_working: Callable[[Mapping[str, int]], int] = lambda _: 0
        moment = weakref.WeakMethod(self._late_moment)  # it goes with the model, not later
        self.holding: Retention = Holding(calls, chunker, plan.stream, moment)
        self.kept = Kept((0,) * len(calls))
        self._trained: tuple[Mapping[str, int], Kept] = ({}, self.kept)

    def _plan_releases(self) -> None:
        crossing = [self.borders.leaves(i) for i in range(len(self.calls) + 1)]
        last: dict[pre_.Leaf, int] = {}
        for i, call in enumerate(self.calls):
            for leaf in (*crossing[i], *call.leaves, *call.outputs):
                last[leaf] = i
        final = {pre_.leaf_of(self.pre, o) for o in self.capture.outputs if isinstance(o, fx.Node)}
        final.update(crossing[-1])
        final.update(leaf for o in self._late for leaf in o.region.leaves)
        readers = Tally(leaf for call in self.calls for leaf in call.leaves)
        # what hooks and pieces are given, the user's code may keep
        final_or_seen = final.union(*crossing)
        for call in self.calls:
            call.sole = [readers[leaf] == 1 and leaf not in final_or_seen for leaf in call.outputs]
        for leaf, i in last.items():
            if leaf not in final and leaf[0] != "input":
                self.calls[i].release.append(leaf)

    def __call__(self, *args: Any) -> list[Any]:
        try:
            with faults.running("a streamed call"):
                return self._run(*args)
        except InternalError as error:
            own = faults.of_run(error, lambda: _compat_hooks.function(self.plain)(*args))
            if own is error:
                raise
        raise own

    def _run(self, *args: Any) -> list[Any]:
        if self._calls == 1:  # the first has made everything, its backward included
            save_codes()
        self._calls += 1
        sizes = bind_sizes(self.capture, args)
        self.sizes = sizes
        table = self.roles.table() if self.roles is not None else None
        sharding = current()
        weights = [args[i] for i, _ in self._parameters]
        if sharding is not None:
            weights = [sharding.shard(w) for w in weights]
            if self.chunker.shards is WHOLE:
                inputs = [n.name for n in self.capture.inputs]
                self.chunker.spread(sharding.spread(dict(zip(inputs, args, strict=True))))
        self._weights = [weakref.ref(w) for w in weights]
        fresh = not any(w.is_leaf and w.grad is not None for w in weights)
        small = self.chunker.whole(sizes) and table is None
        kept = self.kept = Kept(()) if small else self._keeps(table is not None, fresh)
        if torch.is_grad_enabled():
            self._trained = sizes, kept
        if small or kept.whole:
            self.whole_calls += 1
            if sharding is not None:
                raise NotStreamedError("the call is small against the weights")
            return _compat_hooks.function(self.plain)(*args)
        by_node = dict(zip(self.capture.inputs, args, strict=True))
        env: dict[pre_.Leaf, Any] = {("held", n.name): by_node[n] for n in self.capture.changed}
        by_node |= {n: by_node[n].clone() for n in self.capture.changed}
        env |= {("input", n.name): v for n, v in by_node.items()}
        for node, made in self.pre.cones.items():
            if isinstance(made, pre_.Parts):
                env.update(zip(made.leaves, wrapped.parts(by_node[node]), strict=True))
        env.update(pre_.execute(self.pre, [by_node[n] for n in self.pre.inputs]))
        names = {id(args[i]): name for i, name in self._parameters}
        ranks = None if self.together is None else self.together.call(sizes)
        state = CallState(sizes, names=names, sharding=sharding, ranks=ranks)
        step = self._step(table, env) if table is not None else None
        if kept.away:
            state.leaving = Leaving(home(kept.where, self.calls[0].code.device))
        shards = None if sharding is None else sharding.regions(
            [[env.get(leaf) for leaf in call.leaves] for call in self.calls],
            [s.learns for s in self.selected] if step is not None else [True] * len(self.calls),
            [env.get(leaf) for o in self._late for leaf in o.region.leaves],
            [call.calls for call in self.calls],
        )  # fmt: skip
        if self.together is not None and not self.together.agree(sizes, env, kept.levels):
            kept = self.kept = replace(kept, levels=(0,) * len(self.calls))
        del by_node, args
        for i, call in enumerate(self.calls):
            self._cross(i, env, ranks)
            chunk = self.chunk(i)
            tensors = [env[x].clone() if x in self._written else env[x] for x in call.leaves]
            shard = None if shards is None else shards[i]
            if shard is not None:
                shard.before_forward()
            seed = call.code.draw_seed(tensors[0].device)
            away = call.movable if i in kept.away else ()
            own = replace(state, sizes=call.sizes(sizes))
            if step is None:
                run = Run(
                    call.code, own, chunk, seed, call.shared, call.sole, kept.levels[i], away,
                    shard,
                )  # fmt: skip
                outputs = run_region(run, tensors)
            else:
                chosen = self.selected[i]
                run = RoleRun.of(chosen, step, own, chunk, seed, call.shared, away, shard)
                outputs = run_selected(run, tensors)
            del tensors
            if shard is not None:
                shard.after_forward()
            env.update(zip(call.outputs, outputs, strict=True))
            del outputs
            for leaf in call.release:
                env.pop(leaf, None)
        self._cross(len(self.calls), env, ranks)
        return [self._output(o, env, ranks) for o in self.capture.outputs]

    def _cross(self, at: int, env: dict[pre_.Leaf, Any], ranks: Call | None) -> None:
        """Run what lies before a region, which sees whole values."""
        if self.together is None or ranks is None or not self.borders.nodes[at]:
            self.borders.cross(at, env, self.sizes)
            return
        seen = {**env, **self.together.whole(self.borders.leaves(at), env, ranks)}
        self.borders.cross(at, seen, self.sizes)
        env.update((leaf, value) for leaf, value in seen.items() if leaf not in env)

    def _keeps(self, roles: bool, fresh: bool) -> Kept:
        """What this call keeps; the second run of a checkpoint must save what the first did."""
        if not torch.is_grad_enabled() or _compat_hooks.saved_elsewhere():
            return Kept((0,) * len(self.calls))
        sizes = self.sizes if self.together is None else self.together.of_a_rank(self.sizes)
        return self.holding.moved() if roles else self.holding.to_run(sizes, fresh)

    def expected(self, sizes: Mapping[str, int]) -> Kept:
        """What a training call of these sizes keeps, as the latest one did if that had them."""
        latest, kept = self._trained
        return kept if latest == sizes and kept.levels else self.holding.kept(sizes)

    def late_bytes(self, sizes: Mapping[str, int], known: int = 0) -> LateBytes | None:
        """What becomes of the outputs that are promised, where any is; ``known``: the working set
        of what has been done with them, where that is of interest.
        """
        if not self._late:
            return None
        return late_bytes(self.capture, self._late, self.chunker, sizes, known)

    def _late_moment(self, sizes: Mapping[str, int]) -> Moment | None:
        found = self.late_bytes(sizes)
        if found is None:
            return None
        states = sum(found.states.values())
        return Moment(states, 0, found.working, sum(found.weights.values()))

    def weights(self) -> list[Tensor]:
        """The parameters of the latest call that are alive, or this rank's shards of them."""
        return [w for found in self._weights if (w := found()) is not None]

    def weight(self, leaf: pre_.Leaf) -> Tensor | None:
        """One of them."""
        at = [("input", self.capture.inputs[i].name) for i, _ in self._parameters].index(leaf)
        return self._weights[at]() if at < len(self._weights) else None

    def chunk(self, at: int) -> int:
        """Rows per chunk of a region in the latest call."""
        call, shrink = self.calls[at], self.kept.shrink
        if self.plan.stream is None or self.chunker.whole(self.sizes) or self.kept.whole:
            return call.sizes(self.sizes).get("T", 1)
        updates = bool(self.selected) and bool(self.selected[at].updates)
        return self.chunker(call, self.sizes, updates=updates, shrink=shrink)

    def _step(self, table: RoleTable, env: dict[pre_.Leaf, Any]) -> Step:
        """Select the variant of every region for this call."""
        assert self.roles is not None
        if not self.part:  # which knows nothing of the model before it
            self._tell_order(table, env)
        self.table = table
        codes = [(c.code, c.leaves, c.outputs) for c in self.calls]
        self.selected = select(
            codes, env, table, _adapted, armed=self.roles.armed, shard=self.roles.shard
        )
        updates = any(s.updates or s.reduced for s in self.selected)
        return Step(table, updates, table.generation)

    def _tell_order(self, table: RoleTable, env: dict[pre_.Leaf, Any]) -> None:
        """Tell the table at which position of the graph each parameter is first read."""
        if self._first_use is None:
            at = {node: i for i, node in enumerate(self.capture.gm.graph.nodes)}
            self._first_use = {
                n.name: min((at[u] for u in n.users), default=len(at)) for n in self.capture.inputs
            }
        assert self.roles is not None
        order: dict[Any, int] = {
            self.roles.shard(value): position
            for name, position in self._first_use.items()
            if isinstance(value := env.get(("input", name)), nn.Parameter)
        }
        table.tell_order(order)

    def _output(self, output: Any, env: dict[pre_.Leaf, Any], ranks: Call | None) -> Any:
        if isinstance(output, Dropped):
            shape = [cap.canonical(s, self.capture.symbols) for s in output.value.shape]
            return dropped(shape, self.sizes, output.value.dtype, output.value.device)
        if isinstance(output, Late):
            assert self.late is not None
            leaves = output.region.leaves
            return self.late(output, self._whole(leaves, env, ranks), self.sizes)
        if not isinstance(output, fx.Node):
            return output
        if ("held", output.name) in env:
            return env["held", output.name]
        if isinstance(value := cap.value_of(output), torch.SymInt):
            return evaluate(cap.canonical(value, self.capture.symbols), self.sizes)
        return self._whole([pre_.leaf_of(self.pre, output)], env, ranks)[0]

    def _whole(
        self, leaves: Sequence[pre_.Leaf], env: dict[pre_.Leaf, Any], ranks: Call | None
    ) -> list[Any]:
        if self.together is not None and ranks is not None:
            env.update(self.together.whole(leaves, env, ranks))
        return [env[leaf] for leaf in leaves]


def bind_sizes(capture: cap.Capture, args: Sequence[Any]) -> dict[str, int]:
    """Values of the canonical symbols in this call."""
    sizes: dict[str, int] = {}
    for position, dim, size in capture.bindings:
        value = args[position]
        actual = value if dim is None else value.shape[dim]
        (symbol,) = size.free_symbols
        sizes[str(symbol)] = int(actual) - int(size - symbol)
    return sizes
