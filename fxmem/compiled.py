"""A captured function in compiled form: preamble, regions in order, outputs.

:func:`compile_graph` is the body of the Dynamo backend. Regions with equal structure share one
:class:`~fxmem.region_code.RegionCode`, across layers, captures and models.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem import _compat, regions
from fxmem import capture as cap
from fxmem import preamble as pre_
from fxmem.blocks.function import Run, Step, run_selected
from fxmem.blocks.low_rank import adapted
from fxmem.blocks.roles import Adapter, RoleSource, RoleTable
from fxmem.blocks.variants import Selection, select
from fxmem.chunks import Chunker, fixed_bytes
from fxmem.dropped import dropped
from fxmem.executor import CallState, execute, run_region
from fxmem.holding import Holding
from fxmem.joint import Caller, Joint, trace
from fxmem.labels import analyse
from fxmem.lowering import Lowering
from fxmem.passes.canonicalize import Canonicalize
from fxmem.passes.drop_identities import DropIdentities
from fxmem.passes.free_factories import FreeFactories
from fxmem.passes.functionalize import Functionalize
from fxmem.passes.global_mean import GlobalMean
from fxmem.passes.inline_checkpoints import InlineCheckpoints
from fxmem.passes.lower import HANDLERS
from fxmem.passes.scalar_inputs import ScalarInputs, fix_numbers
from fxmem.passes.select_log_probs import SelectLogProbs
from fxmem.passes.share_kv_heads import ShareKvHeads
from fxmem.passes.simplify import Simplify
from fxmem.passes.slice_rows_first import SliceRowsFirst
from fxmem.pipeline import Pass, copy_graph, run_passes
from fxmem.plan import Plan, Stream
from fxmem.region_code import RegionCode
from fxmem.rules import revision
from fxmem.sizes import has_axis, per_token

KEEP_PER_TOKEN = 8
"""Elements per token up to which an output that wants a gradient leaves the graph (metrics,
log-probs).
"""


@dataclass(slots=True)
class Counter:
    """What was done so far: captures, traces of distinct regions, programs, chunk bodies run."""

    captures: int = 0
    traces: int = 0
    programs: int = 0
    bodies: int = 0
    trace_seconds: float = 0.0
    lower_seconds: float = 0.0
    capture_seconds: float = 0.0


COUNTER = Counter()
_CODES: dict[str, RegionCode] = {}
GRAPH_PASSES: tuple[Pass[fx.GraphModule], ...] = (
    InlineCheckpoints(), ScalarInputs(), Functionalize(), DropIdentities(), ShareKvHeads(),
    SliceRowsFirst(), SelectLogProbs(),
)  # fmt: skip
"""Rewrites of the captured graph, in order."""
JOINT_PASSES: tuple[Pass[Joint], ...] = (FreeFactories(), GlobalMean(), Simplify())
"""Rewrites of every traced region, in order."""


@dataclass(slots=True)
class RegionCall:
    """One region of a capture: its code, where its tensors come from, and where its outputs go."""

    code: RegionCode
    leaves: list[pre_.Leaf]
    outputs: list[pre_.Leaf]
    release: list[pre_.Leaf] = field(default_factory=list)
    modules: str = ""
    shared: dict[int, tuple[pre_.Leaf, bool]] = field(default_factory=dict)
    sole: list[bool] = field(default_factory=list)
    """Which outputs have one reader, a later region."""


class CompiledGraph:
    """Callable with the flat arguments of the Dynamo graph."""

    def __init__(
        self,
        capture: cap.Capture,
        pre: pre_.Preamble,
        calls: list[RegionCall],
        plan: Plan,
        chunker: Chunker,
        plain: fx.GraphModule,
        roles: RoleSource | None = None,
    ) -> None:
        self.roles = roles
        self.selected: list[Selection] = []
        self.table: RoleTable | None = None
        self._first_use: dict[str, int] | None = None
        self.capture, self.pre, self.calls, self.plan = capture, pre, calls, plan
        self.chunker, self.plain = chunker, plain
        self.whole_calls = 0
        # Now: Dynamo takes the origins of inputs away after the compilation.
        self._parameters = [
            (i, _compat.input_name(n))
            for i, n in enumerate(capture.inputs)
            if n in capture.parameters
        ]
        _link_shared(capture, calls)
        self._plan_releases()
        self.sizes: dict[str, int] = {}
        self.holding = Holding(calls, chunker, plan.stream)

    def _plan_releases(self) -> None:
        last: dict[pre_.Leaf, int] = {}
        for i, call in enumerate(self.calls):
            for leaf in (*call.leaves, *call.outputs):
                last[leaf] = i
        final = {_leaf(self.pre, o) for o in self.capture.outputs if isinstance(o, fx.Node)}
        readers = Tally(leaf for call in self.calls for leaf in call.leaves)
        for call in self.calls:
            call.sole = [readers[leaf] == 1 and leaf not in final for leaf in call.outputs]
        for leaf, i in last.items():
            if leaf not in final and leaf[0] != "input":
                self.calls[i].release.append(leaf)

    def __call__(self, *args: Any) -> list[Any]:
        sizes = bind_sizes(self.capture, args)
        self.sizes = sizes
        table = self.roles.table() if self.roles is not None else None
        whole = self.chunker.whole(sizes)
        if whole and table is None:
            self.whole_calls += 1
            return self.plain(*args)
        by_node = dict(zip(self.capture.inputs, args, strict=True))
        env: dict[pre_.Leaf, Any] = {("input", n.name): v for n, v in by_node.items()}
        env.update(pre_.execute(self.pre, [by_node[n] for n in self.pre.inputs]))
        state = CallState(sizes, names={id(args[i]): name for i, name in self._parameters})
        step = self._step(table, env) if table is not None else None
        fresh = not any(args[i].is_leaf and args[i].grad is not None for i, _ in self._parameters)
        learns = step is None and torch.is_grad_enabled()
        holding = self.holding.to_run(sizes, fresh) if learns else ()
        del by_node, args
        for i, call in enumerate(self.calls):
            chunk = self.chunk(i)
            tensors = [env[leaf] for leaf in call.leaves]
            if step is None:
                outputs = run_region(
                    call.code, state, chunk, tensors, call.shared, call.sole, i in holding
                )
            else:
                seed = call.code.draw_seed(tensors[0].device)
                run = Run(self.selected[i], step, state, chunk, seed, call.shared)
                outputs = run_selected(run, tensors)
            del tensors
            env.update(zip(call.outputs, outputs, strict=True))
            del outputs
            for leaf in call.release:
                env.pop(leaf, None)
        return [self._output(o, env) for o in self.capture.outputs]

    def chunk(self, at: int) -> int:
        """Rows per chunk of a region in the latest call."""
        if self.plan.stream is None or self.chunker.whole(self.sizes):
            return self.sizes.get("T", 1)
        updates = bool(self.selected) and bool(self.selected[at].updates)
        return self.chunker(self.calls[at].code, self.sizes, updates=updates)

    def _step(self, table: RoleTable, env: dict[pre_.Leaf, Any]) -> Step:
        """Select the variant of every region for this call."""
        assert self.roles is not None
        self._tell_order(table, env)
        self.table = table
        codes = [(c.code, c.leaves, c.outputs) for c in self.calls]
        self.selected = select(codes, env, table, _adapted, armed=self.roles.armed)
        updates = any(s.updates for s in self.selected)
        return Step(table, updates, table.generation)

    def _tell_order(self, table: RoleTable, env: dict[pre_.Leaf, Any]) -> None:
        """Tell the table at which position of the graph each parameter is first read."""
        if self._first_use is None:
            at = {node: i for i, node in enumerate(self.capture.gm.graph.nodes)}
            self._first_use = {
                n.name: min((at[u] for u in n.users), default=len(at)) for n in self.capture.inputs
            }
        order = {
            value: position
            for name, position in self._first_use.items()
            if isinstance(value := env.get(("input", name)), nn.Parameter)
        }
        table.tell_order(order)

    def _output(self, output: Any, env: dict[pre_.Leaf, Any]) -> Any:
        if isinstance(output, Dropped):
            shape = [cap.canonical(s, self.capture.symbols) for s in output.value.shape]
            return dropped(shape, self.sizes, output.value.dtype, output.value.device)
        return env[_leaf(self.pre, output)] if isinstance(output, fx.Node) else output


@dataclass(frozen=True, slots=True)
class Dropped:
    """An output that does not leave the graph."""

    value: Tensor


def _leaf(pre: pre_.Preamble, node: fx.Node) -> pre_.Leaf:
    if node in pre.narrow:
        return pre.narrow[node]
    return ("input" if node.op == "placeholder" else "main", node.name)


def bind_sizes(capture: cap.Capture, args: Sequence[Any]) -> dict[str, int]:
    """Values of the canonical symbols in this call."""
    sizes: dict[str, int] = {}
    for position, dim, size in capture.bindings:
        value = args[position]
        actual = value if dim is None else value.shape[dim]
        (symbol,) = size.free_symbols
        sizes[str(symbol)] = int(actual) - int(size - symbol)
    return sizes


def compile_graph(
    plain: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan,
    roles: RoleSource | None = None,
) -> CompiledGraph:  # fmt: skip
    """Analyse, split and lower a Dynamo graph. Counts in :data:`COUNTER`."""
    start = time.perf_counter()
    gm = copy_graph(plain)
    _compat.unify_sizes(gm)
    fix_numbers(gm)
    gm = run_passes(GRAPH_PASSES, gm)
    ambient = _ambient(example_inputs)
    capture = cap.analyse(gm, example_inputs, ambient)
    if plan.stream is not None and plan.stream.logits == "drop":
        _drop_outputs(capture)
    pre = pre_.lower(capture)
    parts = regions.split(capture, pre, _mixes)
    lowering = Lowering.of(plan)
    calls = [_region_call(r, pre, lowering) for r in parts]
    COUNTER.captures += 1
    COUNTER.capture_seconds += time.perf_counter() - start
    chunker = _chunker(capture, calls, example_inputs, plan)
    return CompiledGraph(capture, pre, calls, plan, chunker, plain, roles)


def _chunker(
    capture: cap.Capture, calls: list[RegionCall], example_inputs: Sequence[Any], plan: Plan
) -> Chunker:
    weights = [
        v
        for n, v in zip(capture.inputs, example_inputs, strict=True)
        if n in capture.parameters and isinstance(v, Tensor)
    ]
    saved = 0.0
    for call in calls:
        for value, leaf in zip(call.code.values, call.leaves, strict=True):
            if leaf[0] == "main":
                shape = cap.canonical_shape(value, call.code.joint.symbols)
                saved += per_token(shape) * value.dtype.itemsize
    stream = plan.stream or Stream()
    footprints = [call.code.footprint for call in calls]
    return Chunker(stream, fixed_bytes(weights, saved), footprints)


def _link_shared(capture: cap.Capture, calls: list[RegionCall]) -> None:
    """Parameters of several regions (tied weights): one of them returns the whole gradient.

    The first region that uses the parameter is the last to run in the backward; the others hand
    their part on. Only where the loss is the one differentiable output, so that all of them are
    sure to run.
    """
    wanted = [
        o for o in capture.outputs
        if isinstance(o, fx.Node) and cap.is_tensor(o) and cap.value_of(o).requires_grad
    ]  # fmt: skip
    if len(wanted) != 1 or cap.value_of(wanted[0]).dim():
        return
    reached = _reached(calls, ("main", wanted[0].name))
    users: dict[pre_.Leaf, list[int]] = {}
    for i, call in enumerate(calls):
        for leaf, grad in zip(call.leaves, call.code.joint.grads, strict=True):
            if leaf[0] == "input" and grad is not None and i in reached:
                users.setdefault(leaf, []).append(i)
    for leaf, where in users.items():
        if len(where) > 1 and len(set(where)) == len(where):
            for i in where:
                at = calls[i].leaves.index(leaf)
                calls[i].shared[at] = (leaf, i == where[0])


def _reached(calls: list[RegionCall], loss: pre_.Leaf) -> set[int]:
    """Regions that the loss's gradient flows through."""
    wanted, out = {loss}, set()
    for i in reversed(range(len(calls))):
        call = calls[i]
        if any(o in wanted for o in call.outputs):
            out.add(i)
            grads = zip(call.leaves, call.code.joint.grads, strict=True)
            wanted.update(leaf for leaf, g in grads if g is not None and leaf[0] == "main")
    return out


def _ambient(example_inputs: Sequence[Any]) -> list[tuple[str, torch.dtype, bool]]:
    devices = {v.device.type for v in example_inputs if isinstance(v, Tensor)}
    return [
        (d, torch.get_autocast_dtype(d), True)
        for d in sorted(devices)
        if torch.is_autocast_enabled(d)
    ]


def _drop_outputs(capture: cap.Capture) -> None:
    """With a scalar loss, streamed activations do not leave the graph."""
    nodes = [o for o in capture.outputs if isinstance(o, fx.Node) and cap.is_tensor(o)]
    if not any(
        o in capture.main_set and cap.value_of(o).dim() == 0 and cap.value_of(o).requires_grad
        for o in nodes
    ):
        return
    drop = set()
    for o in nodes:
        learned = o in capture.main_set and cap.value_of(o).requires_grad
        if learned and per_token(capture.shape(o)) > KEEP_PER_TOKEN:
            drop.add(o)
    capture.outputs = [
        Dropped(cap.value_of(o)) if isinstance(o, fx.Node) and o in drop else o
        for o in capture.outputs
    ]
    keep = {o for o in capture.outputs if isinstance(o, fx.Node)}
    needed = set(keep)
    for n in reversed(capture.main):
        if n in needed:
            needed.update(n.all_input_nodes)
    gone = capture.main_set - needed
    capture.nodes = [n for n in capture.nodes if n not in gone]
    capture.main = [n for n in capture.main if n in needed]
    capture.main_set = frozenset(capture.main)


def _mixes(region: regions.Region) -> bool:
    """The region's forward reads another token's wide value somewhere."""
    joint = trace(region, Canonicalize(), backward=False)
    labels = analyse(joint, causal=True)
    for uses in labels.uses.values():
        for use in uses:
            info = joint.info[use.operand]
            streams = use.operand in joint.learned and any(has_axis(d) for d in info.shape)
            if (
                use.cut is None
                and (streams or cap.is_wide(info.shape))
                and info.dtype.is_floating_point
            ):
                return True
            label = labels.label[use.operand]
            if use.cut is not None and getattr(label, "cut", None) not in (None, use.cut):
                return True
    return False


def _region_call(region: regions.Region, pre: pre_.Preamble, lowering: Lowering) -> RegionCall:
    key = f"{revision()} {lowering} {region.key()}"
    if key not in _CODES:
        name = f"region{len(_CODES)}"
        _CODES[key] = RegionCode(
            region, Canonicalize, _joint_passes, HANDLERS, execute, COUNTER, name, lowering
        )
    outputs: list[pre_.Leaf] = [("main", n.name) for n in region.outputs]
    return RegionCall(_CODES[key], region.leaves, outputs, modules=_modules(region))


def _adapted(code: RegionCode, adapters: Mapping[int, Adapter]) -> RegionCode:
    def make(region: regions.Region, caller: Callable[[], Caller], name: str) -> RegionCode:
        return RegionCode(
            region, caller, _joint_passes, HANDLERS, execute, COUNTER, name, code.lowering
        )

    return adapted(code, adapters, make)


def _joint_passes(joint: Joint) -> Joint:
    return run_passes(JOINT_PASSES, joint)


def _modules(region: regions.Region) -> str:
    paths = list(dict.fromkeys(p for n in region.nodes if (p := cap.module_path(n))))
    if not paths:
        return ""
    return paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
