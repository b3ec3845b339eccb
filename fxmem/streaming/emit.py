"""From a schedule to a program: every loop body, straight line and mask becomes an
``fx.GraphModule``.

The rewrite decides nothing; it follows the labels. Results of a body are written into buffers and
sums are added into accumulators in place, matrix products without a temporary.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import sympy
from torch import fx

from fxmem.axes.signature import Cut, TensorInfo
from fxmem.axes.sizes import AT, CHUNKS, STEP, has_axis
from fxmem.program import body_ops as runtime
from fxmem.program import steps as ir
from fxmem.program.body_op import BODY_OPS
from fxmem.rewriting.pipeline import Pass, run_passes
from fxmem.streaming.carried_forms import carried, ends, is_final
from fxmem.streaming.exchanges import Exchanges, Form
from fxmem.streaming.labels import Use, signature_of, tensor_operands
from fxmem.streaming.loop_body import Body, Handler, accumulator
from fxmem.streaming.schedule import Loop, Schedule, producer

_SUMS = frozenset({"aten.sum.default", "aten.sum.dim_IntList"})


class Emitter:
    """Assigns names and turns a schedule into steps."""

    def __init__(
        self, plan: Schedule, name: str, causal: bool, handlers: dict[str, Handler],
        body_passes: Sequence[Pass[fx.Graph]] = (), own: Collection[fx.Node] | None = None,
    ) -> None:  # fmt: skip
        """``own``: inputs of which this rank has its rows alone; None: there are no other ranks."""
        self.plan, self.labels, self.joint = plan, plan.labels, plan.labels.joint
        self.name, self.causal = name, causal
        self.handlers, self.body_passes = handlers, body_passes
        names = {str(s) for e in self.joint.symbols.values() for s in e.free_symbols}
        self.ints = sorted(names | ({str(STEP), str(CHUNKS)} if self.labels.states else set()))
        self.names: dict[fx.Node, str] = {}
        self.masks: dict[fx.Node, ir.Mask] = {}
        self.own = own
        self.exchanges = Exchanges(self.joint, self.names)
        self.bounds = ("lo", "hi") if own is None else ("lo", "hi", str(AT))

    def run(self, wanted: Sequence[Form | None] | None = None) -> ir.Program:
        """The program of ``wanted`` values; by default the schedule's roots, whole."""
        inputs = [
            *self.joint.inputs,
            self.joint.seed,
            *(t for t in self.joint.tangents if t is not None),
            *self.plan.held,
        ]
        for i, node in enumerate(inputs):
            self.names[node] = f"x{i}"
        self.exchanges.enter(self.own or ())
        steps: list[ir.Step] = []
        last = max([*self.plan.straight, *(loop.stage for loop in self.plan.loops)], default=0)
        loops = {loop.stage: loop for loop in self.plan.loops}
        for stage in range(last + 1):
            if stage in self.plan.straight:
                steps += self._straight(self.plan.straight[stage])
            if stage in loops:
                steps += self._loop(loops[stage])
        wanted = [(r, False) for r in self.plan.roots] if wanted is None else wanted
        left = {form: self.exchanges.output(*form) for form in wanted if form is not None}
        steps += [step for _, more in left.values() for step in more]
        outputs = [None if form is None else left[form][0] for form in wanted]
        infos = {self.names[n]: self.joint.info[n] for n in self.names} | self.exchanges.shapes
        shapes = {name: (info.shape, info.dtype) for name, info in infos.items()}
        made = [b for s in steps if isinstance(s, ir.Loop) for b in s.allocate]
        shapes |= {b.name: (b.shape, b.result) for b in made}
        return ir.Program(
            self.name, self.ints, [self.names[n] for n in inputs], list(outputs),
            _free(steps, outputs), list(self.masks.values()), self.causal,
            list(self.labels.barriers), shapes,
        )  # fmt: skip

    def _body(self, *extra: str) -> Body:
        body = Body(self.labels, self.ints, extra)
        body.names, body.local = self.names, self.exchanges.local
        return body

    def _straight(self, nodes: list[fx.Node]) -> list[ir.Step]:
        body = self._body()
        results = []
        for node in nodes:
            source = producer(node)
            if (source, None) not in body.chunks:
                uses = self.labels.uses.get(source) or tuple(
                    Use(o, None) for o in tensor_operands(source, self.joint)
                )
                uses = tuple(Use(u.operand, None) for u in uses)
                body.chunks[source, None] = (
                    body.graph.node_copy(source)
                    if source.op == "get_attr"
                    else body.copy(source, uses, None)
                )
                if source.op == "get_attr":
                    setattr(body.module, source.target, getattr(self.joint.module, source.target))
            if node is not source:
                body.chunks[node, None] = body.call(
                    operator.getitem, body.chunks[source, None], node.args[1]
                )
            results.append(node)
        for i, node in enumerate(results):
            self.names[node] = f"s{len(self.names)}_{i}"
        body.graph.output(tuple(body.chunks[n, None] for n in results))
        made = [self.names[n] for n in results]
        step = ir.Straight(body.finish(), self.ints, list(body.tensors), made)
        return [*self.exchanges.before(body.gathered), step]

    def _loop(self, loop: Loop) -> list[ir.Step]:
        allocate, parts = [], list(loop.sums) if self.own is not None else []
        for node in (*loop.buffers, *loop.sums):
            info: TensorInfo = self.joint.info[node]
            total = node in loop.sums
            self.names[node] = f"{'acc' if total else 'buf'}{len(self.names)}"
            total = total and not is_final(node, self.joint)
            dtype = accumulator(info.dtype) if total else info.dtype
            buffer = ir.Buffer(self.names[node], info.shape, dtype, info.dtype, total)
            allocate.append(buffer)
            if self.own is not None and node in loop.buffers:
                buffer.local = self.exchanges.keeps(node, self._cut(node))
                if not buffer.local:
                    buffer.zero = True
                    parts.append(node)
        body = self._body(*self.bounds)
        for node in loop.nodes:
            state = self.labels.states.get(node)
            if state is not None and self._hands_on(state, loop):
                info = self.joint.info[state]
                shape = (sympy.Integer(1), *info.shape[1:])
                name = body.carried[node] = f"state{len(self.names)}_{len(allocate)}"
                start = self._start(node)
                allocate.append(ir.Buffer(name, shape, info.dtype, info.dtype, not start, start))
        body.sums = set(loop.sums)
        body.kept = set(loop.buffers)
        body.order = {n: i for i, n in enumerate(loop.nodes)}
        masks = self._loop_masks(loop, body)
        for node in loop.nodes:
            self._node(body, node)
        for state, after in body.handed_on:
            body.call(runtime.hand_on, state, after)
        body.graph.output(None)
        where = f"{self.name} {', '.join(b.name for b in allocate)}"
        body.graph = run_passes(self.body_passes, body.graph, where)
        sums = [b for b in allocate if b.zero and b.dtype != b.result]
        step = ir.Loop(
            body.finish(), self.ints, list(body.tensors), masks, loop.direction < 0, allocate, sums,
            bounds=self.bounds,
        )  # fmt: skip
        return [*self.exchanges.before(body.gathered), step, *self.exchanges.after(parts)]

    def _cut(self, node: fx.Node) -> Cut:
        cut = self.labels.of(node).cut
        assert cut is not None
        return cut

    def _start(self, node: fx.Node) -> str:
        """The tensor that the state is at first; empty where that is zeros."""
        signature = signature_of(node, self.joint)
        assert signature is not None
        at = signature.initial
        return "" if at is None else self.names[self.labels.uses[node][at].operand]

    def _hands_on(self, state: fx.Node, loop: Loop) -> bool:
        """The loop makes the states, and does not read them."""
        return state not in self.plan.held and self.labels.of(state).stage == loop.stage

    def _loop_masks(self, loop: Loop, body: Body) -> list[str]:
        """One argument per distinct attention mask of the loop: its spans for the current chunk."""
        names = []
        for node in loop.nodes:
            if node in self.labels.masked:
                (operand,) = (u.operand for u in self.labels.uses[node] if u.mask)
                if operand not in self.masks:
                    self.masks[operand] = self._mask(operand, body.gathered)
                signature = signature_of(node, self.joint)
                assert signature is not None and signature.order is not None
                self.masks[operand].ordered |= not signature.order.placed
                name = self.masks[operand].name
                if name not in names:
                    names.append(name)
        body.masks = {name: body.opaque(name) for name in names}
        body.mask_of = {n: m.name for n, m in self.masks.items()}
        return names

    def _mask(self, operand: fx.Node, gathered: dict[fx.Node, None]) -> ir.Mask:
        body = self._body("lo", "hi")
        info = self.joint.info[operand]
        queries = info.shape[-2]
        if has_axis(queries):
            value = body.chunk(operand, Cut(len(info.shape) - 2, queries))
        else:
            value = body.operand(Use(operand, None))
        body.graph.output(value)
        gathered |= body.gathered
        module = body.finish()
        return ir.Mask(
            f"mask{len(self.masks)}", module, self.ints, list(body.tensors), module.code, False
        )

    def _node(self, body: Body, node: fx.Node) -> None:
        label = self.labels.label[node]
        handler = self.handlers.get(str(node.target))
        if node in body.labels.states:
            handler = carried
        value: Any = handler(body, node) if handler is not None else None
        if value is None and node not in body.sums:
            value = _default(body, node, label)
        if node in body.sums:
            _accumulate(body, node, value)
        elif value is not None:
            key = label.cut if not isinstance(label, tuple) else None
            body.chunks[node, key] = value
            if node in body.kept:
                self._write(body, node, value, label.cut)

    def _write(self, body: Body, node: fx.Node, value: Any, cut: Cut) -> None:
        start = body.ints(AT) if node in body.local else body.ints.rows(cut)[0]
        extra = (
            () if (cut.outer, cut.inner) == (1, 1) else (body.ints(cut.outer), body.ints(cut.inner))
        )
        body.call(runtime.put, body.input(self.names[node]), value, cut.dim, start, *extra)


def _default(body: Body, node: fx.Node, label: Any) -> Any:
    if node.target is operator.getitem:
        return body.item(node)
    cut = label.cut if not isinstance(label, tuple) else None
    return body.copy(node, body.labels.uses[node], cut)


def _accumulate(body: Body, node: fx.Node, value: Any) -> None:
    """Add the chunk's part of a sum; products go straight into the accumulator."""
    acc = body.input(body.names[node])
    target = str(node.target)
    if is_final(node, body.joint):
        last = ends(body, node.args[0])
        body.call(runtime.keep, acc, body.item(node), *last)
        return
    form = next((op for op in BODY_OPS.values() if op.accumulates == target), None)
    if value is None and form is not None:
        operands = (body.operand(u) for u in body.labels.uses[node])
        body.call(form.fn, acc, *operands, *(node.args[i] for i in form.extra))
    elif value is None and target == "aten.slice_backward.default":
        (use,) = body.labels.uses[node]
        signature = signature_of(node, body.joint)
        assert use.cut is not None and signature is not None
        part, (first, _) = body.operand(use), body.ints.rows(use.cut)
        (shift,) = signature.shift.values()
        start = body.call(operator.sub, first, body.ints(shift))
        body.call(runtime.add_rows, acc, part, use.cut.dim, start)
    elif value is None and node.target is operator.getitem:
        part = body.item(node)
        if part is not None:
            body.call(runtime.add, acc, part)
    elif value is None:
        part = body.copy(node, body.labels.uses[node], None)
        info: TensorInfo = body.joint.info[node]
        if target in _SUMS and accumulator(info.dtype) != info.dtype:
            # rounded once, at the end, and not once per chunk
            part.kwargs = {**part.kwargs, "dtype": accumulator(info.dtype)}
        body.call(runtime.add, acc, part)


def _free(steps: list[ir.Step], outputs: Sequence[str | None]) -> list[ir.Step]:
    """Drop every allocated name after its last reader."""
    last: dict[str, int] = {}
    made: set[str] = set()
    for i, step in enumerate(steps):
        if isinstance(step, ir.Loop):
            made.update(b.name for b in step.allocate)
        elif isinstance(step, (ir.Straight, ir.Exchange)):
            made.update(step.results)
        if not isinstance(step, ir.Free):
            for n in step.tensors:
                last[n] = i
        if isinstance(step, ir.Loop):
            last.update((b.start, i) for b in step.allocate if b.start)
    out: list[ir.Step] = []
    for i, step in enumerate(steps):
        out.append(step)
        names = [n for n in made if last.get(n) == i and n not in outputs]
        if names:
            out.append(ir.Free(sorted(names)))
    return out
