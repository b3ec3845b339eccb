"""Labels: what every value of a joint graph is along the streamed axis, and when it can be had.

| kind | meaning |
|---|---|
| STRAIGHT | computed whole, outside the loops: inputs, weights, narrow values, sums, barriers |
| FLEX | cheap, wide and parameter-free (masks, constants): recomputed for whatever slice is asked |
| CUT | chunk i of it needs chunk i of its cut operands |
| PARTIAL | the axis was contracted away: chunks add up |

*Stage*: a CUT value of stage k is made in loop k. A value that is needed complete (keys at
attention, a sum) is complete after its loop, so its users are one stage later, with two exceptions
that remove loops: a PREFIX use in an ascending loop reads only rows that exist already, and a
SUFFIX sum in a descending loop is final for the rows of the current chunk.

An op with a *carried* letter needs a state of the chunk before (after) its own. It is in the first
loop that ascends (descends), which hands the state on. Its state is a CUT value too, one entry per
chunk: with it, any other loop can make the op's chunk again.

The rules come from :mod:`fxmem.rules`; whatever a row does not allow is a *barrier*: the op runs
whole and exact, and :class:`Barrier` says why.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from fxmem.axes.signature import (
    AxisRule,
    Call,
    Cut,
    Signature,
    TensorInfo,
    place,
)
from fxmem.axes.sizes import Size, T, has_axis, product, same
from fxmem.frontend.capture import canonical, is_wide
from fxmem.frontend.joint import Joint
from fxmem.frontend.origin import module_path, source_line
from fxmem.program.steps import Barrier
from fxmem.rules import carries_state, lookup, no_fit
from fxmem.rules.carried import ASCENDING, DESCENDING
from fxmem.streaming.carried_states import state_of
from fxmem.streaming.cut_options import Option, options, shifted
from fxmem.streaming.label import STATES, Kind, Label


@dataclass(frozen=True, slots=True)
class Use:
    """How a node uses one tensor operand: whole (``cut`` is None) or its chunk under ``cut``.

    ``prefix``: of the whole, only the rows up to the chunk's last. ``mask``: it hides rows.
    """

    operand: fx.Node
    cut: Cut | None
    prefix: bool = False
    mask: bool = False


Fact = tuple[Call, AxisRule | None, Signature | None, list[fx.Node]]
"""What a node is whatever the loops are: its call, its row, the signature where that fits, and
its tensor operands."""


@dataclass(slots=True)
class Labels:
    joint: Joint
    directions: tuple[int, ...]
    label: dict[fx.Node, Any] = field(default_factory=dict)
    uses: dict[fx.Node, tuple[Use, ...]] = field(default_factory=dict)
    barriers: list[Barrier] = field(default_factory=list)
    masked: set[fx.Node] = field(default_factory=set)
    """Ops whose mask is made into a tile map."""
    held: frozenset[fx.Node] = frozenset()
    carries: bool = False
    """Some op has a carried letter: loops without a given direction ascend and descend in turn."""
    ranks: bool = False
    """Chunks are those of several ranks at once: none comes before another, and what one hands on
    or completes for the next does not exist."""
    states: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Op with a carried letter -> its state, where the op is cut along that letter."""
    facts: dict[fx.Node, Fact] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Label:
        label = self.label[node]
        assert isinstance(label, Label), node
        return label


def call_of(node: fx.Node, joint: Joint) -> Call:
    """The call of a node: :class:`TensorInfo` for tensors and sizes for SymInts."""

    def convert(a: fx.Node) -> Any:
        info = joint.info[a]
        return canonical(a.meta["val"], joint.symbols) if info is None else info

    args, kwargs = fx.map_arg((node.args, node.kwargs), convert)
    info = joint.info[node]
    return Call(str(node.target), tuple(args), kwargs, info if isinstance(info, tuple) else (info,))


def signature_of(node: fx.Node, joint: Joint) -> Signature | None:
    """The signature of a node's call; None where it has no row, or one that does not fit it."""
    row, call = lookup(node.target), call_of(node, joint)
    found = row.rule(call) if row is not None else None
    return found if found is not None and len(found.ins) == len(call.tensors) else None


def tensor_operands(node: fx.Node, joint: Joint) -> list[fx.Node]:
    """Tensor operands in argument order, repeats included."""
    found: list[fx.Node] = []
    fx.map_arg(
        (node.args, node.kwargs), lambda a: found.append(a) if joint.info[a] is not None else None
    )
    return found


def analyse(
    joint: Joint, *, causal: bool, directions: Sequence[int] = (),
    held: Collection[fx.Node] = (), ranks: bool = False, facts: dict[fx.Node, Fact] | None = None,
) -> Labels:  # fmt: skip
    """Label every node.

    ``causal``: attention masks are known to hide later keys; ``directions`` are one per loop;
    ``held`` values exist before all loops; ``ranks``: several have parts of the sequence.
    ``facts``: what is known of this graph's nodes; the others are added.
    """
    carries = not ranks and any(carries_state(n.target) for n in joint.graph.nodes)
    labels = Labels(joint, tuple(directions), held=frozenset(held), carries=carries, ranks=ranks)
    labels.facts = {} if facts is None else facts
    for node in joint.graph.nodes:
        if node.op == "placeholder" or node.op == "get_attr":
            labels.label[node] = Label(Kind.STRAIGHT)
        elif node.op == "call_function" and joint.info[node] is not None:
            _visit(labels, node, causal)
    return labels


def _visit(labels: Labels, node: fx.Node, causal: bool) -> None:
    if node.target is operator.getitem and isinstance(labels.label.get(node.args[0]), tuple):
        labels.label[node] = labels.label[node.args[0]][node.args[1]]
        return
    if node not in labels.facts:
        labels.facts[node] = _fact(node, labels.joint)
    call, row, signature, operands = labels.facts[node]
    several = isinstance(labels.joint.info[node], tuple)
    wide = any(o is not None and _streams(labels, node, o) for o in call.outs)
    if signature is not None and signature.carried:
        signature = _carried(labels, node, signature)
    if signature is not None and signature.order is not None:
        signature = _ordered(labels, node, signature, operands, causal)
    outcome = _decide(labels, call, row, signature, operands, wide)
    if outcome is None:
        reason = "its axis is needed complete" if signature is not None else no_fit(row, call)
        _barrier(labels, node, call, operands, reason)
        return
    label, labels.uses[node] = outcome
    labels.label[node] = (label,) if several and not isinstance(label, tuple) else label
    if isinstance(label, tuple) and label[-1] is not None and label[-1].cut == STATES:
        state = state_of(node, labels.joint)
        assert state is not None
        labels.states[node] = state


def _fact(node: fx.Node, joint: Joint) -> Fact:
    call, row = call_of(node, joint), lookup(node.target)
    if row is not None and isinstance(joint.info[node], tuple):
        row = replace(row, cheap=False)
    operands = tensor_operands(node, joint)
    signature = row.rule(call) if row is not None else None
    if signature is not None and len(signature.ins) != len(operands):
        signature = None
    return call, row, signature, operands


def _carried(labels: Labels, node: fx.Node, signature: Signature) -> Signature:
    """Where the states are there already, chunks may come in any order."""
    state = state_of(node, labels.joint)
    if state is None or labels.ranks:
        return replace(signature, carried={}, whole=signature.whole | signature.carried.keys())
    if state in labels.held:
        return replace(signature, carried=dict.fromkeys(signature.carried, 0))
    return signature


def _streams(labels: Labels, node: fx.Node, info: TensorInfo) -> bool:
    """The value is to be cut if it can be."""
    if node in labels.joint.learned:
        return any(has_axis(d) for d in info.shape)
    return is_wide(info.shape)


def _ordered(
    labels: Labels, node: fx.Node, signature: Signature, operands: list[fx.Node], causal: bool
) -> Signature:
    """Whether later keys are hidden is what the call says, or what is known of masks where a tile
    map of its own is made.
    """
    order, hides = signature.order, bool(signature.prefix)
    assert order is not None
    mask = None if order.mask is None else labels.of(operands[order.mask]).kind
    # chunks of the batch, and of queries that are not the tokens, read the mask as it is
    tokens = same(labels.joint.info[operands[order.rows]].shape[-2], T)
    if mask in (Kind.STRAIGHT, Kind.FLEX) and tokens:
        labels.masked.add(node)
        # keys of another length (of an encoder) come neither before nor after a token
        hides = causal and not order.placed
    # a key's row tells its place in the stream only where neither it nor the queries are shifted
    cuts = [labels.of(operands[i]).cut for i in (order.rows, *order.keys)]
    return signature.hiding(later=hides and all(c is None or c.offset == 0 for c in cuts))


def _decide(
    labels: Labels,
    call: Call,
    row: AxisRule | None,
    signature: Signature | None,
    operands: list[fx.Node],
    wide: bool,
) -> tuple[Any, tuple[Use, ...]] | None:
    given = [labels.of(o) for o in operands]
    is_cut = any(g.kind is Kind.CUT for g in given)
    flexible = any(g.kind is Kind.FLEX for g in given)
    if not is_cut and not flexible and not wide:
        summed = _summed(labels, call, signature, operands, given)
        return summed or _straight(labels, call, operands, given)
    if row is None or signature is None:
        return None
    found = options(call, signature, given)
    flex = row.cheap and len(call.outs) == 1 and (len(found) != 1 or not operands)
    if flex and not is_cut and (found or not operands or wide):
        stage = max((_ready(labels, g, None) for g in given), default=0)
        return Label(Kind.FLEX, stage), tuple(Use(o, None) for o in operands)
    for option in sorted(found, key=lambda o: (o.conflicts, o.contracts)):
        result = _apply(labels, call, signature, operands, given, option)
        if result is not None:
            return result
    return None


def _summed(
    labels: Labels, call: Call, signature: Signature | None, operands: list[fx.Node],
    given: list[Label],
) -> tuple[Any, tuple[Use, ...]] | None:  # fmt: skip
    """A sum over a streamed input adds up chunk by chunk, and so can start from another sum: the
    gradient of a tied embedding from that of the head.
    """
    infos = [labels.joint.info[o] for o in operands]
    reads = any(
        o in labels.joint.learned and i.dtype.is_floating_point and _streams(labels, o, i)
        for o, i in zip(operands, infos, strict=True)
    )
    if not reads or signature is None:
        return None
    for option in options(call, signature, given):
        if option.contracts:
            return _apply(labels, call, signature, operands, given, option)
    return None


def _straight(
    labels: Labels, call: Call, operands: list[fx.Node], given: list[Label]
) -> tuple[Any, tuple[Use, ...]]:
    uses = tuple(Use(o, None) for o in operands)
    stage = max((_ready(labels, g, u) for g, u in zip(given, uses, strict=True)), default=0)
    label = Label(Kind.STRAIGHT, stage)
    return (label if len(call.outs) == 1 else tuple(label for _ in call.outs)), uses


def _apply(
    labels: Labels,
    call: Call,
    sig: Signature,
    operands: list[fx.Node],
    given: list[Label],
    option: Option,
) -> tuple[Any, tuple[Use, ...]] | None:
    uses = [
        Use(operand, cut, i in sig.prefix, mask=sig.order is not None and i == sig.order.mask)
        for i, (operand, cut) in enumerate(zip(operands, option.cuts, strict=True))
    ]
    if not any(u.cut is not None for u in uses):
        return None
    stage = max(_ready(labels, g, u) for g, u in zip(given, uses, strict=True))
    if direction := sig.carried.get(option.letter, 0):
        while labels_direction(labels, stage) != direction:
            stage += 1
    outs = [_output(sig, option, i, info, stage) for i, info in enumerate(call.outs)]
    if any(o is False for o in outs):
        return None
    return (outs[0] if len(outs) == 1 else tuple(outs)), tuple(uses)


def _output(sig: Signature, option: Option, index: int, info: TensorInfo | None, stage: int) -> Any:
    """Label of one output; None where it does not exist, False where this option cannot make it."""
    dims = sig.outs[index]
    if info is None or dims is None:
        return None
    if option.letter in sig.carried and index == len(sig.outs) - 1:
        return Label(Kind.CUT, stage, STATES)
    if option.letter in sig.carried and index == sig.final:
        return Label(Kind.PARTIAL, stage)
    cut = place(option.letter, option.relative, dims, sig.extent)
    if cut is None:
        if any(option.letter in d for d in dims) or not sig.sums:
            return False
        return Label(Kind.PARTIAL, stage, suffix=index in sig.suffix)
    if option.letter in sig.shift:
        moved = shifted(cut, sig.shift[option.letter], info.shape[cut.dim])
        if moved is not None:
            return Label(Kind.CUT, stage, moved)
        # rows of a table: not as many as the length has
        table = sig.fills and not has_axis(info.shape[cut.dim]) and (cut.outer, cut.inner) == (1, 1)
        return Label(Kind.PARTIAL, stage) if table else False
    if not same(info.shape[cut.dim], product((cut.outer, cut.length, cut.inner))):
        return False
    return Label(Kind.CUT, stage, cut)


def _ready(labels: Labels, label: Label, use: Use | None) -> int:
    """The first stage at which the use can be served."""
    chunk = use is not None and use.cut is not None
    direction = labels_direction(labels, label.stage)
    if label.kind is Kind.CUT and not (chunk and use is not None and use.cut == label.cut):
        ready = use is not None and use.prefix and direction == ASCENDING and _plain(label.cut)
        return label.stage if ready and not labels.ranks else label.stage + 1
    if label.kind is Kind.PARTIAL:
        ready = label.suffix and direction == DESCENDING and use is not None and _plain(use.cut)
        return label.stage if ready and not labels.ranks else label.stage + 1
    return label.stage


def _plain(cut: Cut | None) -> bool:
    """Row r is that of token r, so that a chunk has the rows up to its last token, or from its
    first.
    """
    return cut is not None and (cut.offset, cut.outer, cut.inner) == (0, 1, 1)


def labels_direction(labels: Labels, stage: int) -> int:
    if stage < len(labels.directions):
        return labels.directions[stage]
    return DESCENDING if labels.carries and stage % 2 else ASCENDING


def _barrier(
    labels: Labels, node: fx.Node, call: Call, operands: list[fx.Node], reason: str
) -> None:
    given = [labels.of(o) for o in operands]
    label, labels.uses[node] = _straight(labels, call, operands, given)
    alone = isinstance(labels.joint.info[node], tuple) and not isinstance(label, tuple)
    labels.label[node] = (label,) if alone else label
    shape = next((o.shape for o in call.outs if o is not None), ())
    small = call.op in _PICKS and _part_of_given(labels.joint, shape)
    labels.barriers.append(
        Barrier(node, call.op, reason, module_path(node), source_line(node), shape, small)
    )


_PICKS = frozenset((
    "aten.slice.Tensor", "aten.slice_backward.default", "aten.select.int",
    "aten.select_backward.default", "aten.index.Tensor", "aten.index_select.default",
    "aten.index_put.default", "aten.index_add.default",
    "aten.view.default", "aten._unsafe_view.default",
))  # fmt: skip
"""Rows out of a value, and back into zeros; views of some."""


def _part_of_given(joint: Joint, shape: tuple[Size, ...]) -> bool:
    """Rows as wide as those that the region is given or gives along an axis that varies."""
    ends = [n for n in (*joint.inputs, *joint.tangents, *joint.outputs) if n is not None]
    shapes = [i.shape for i in map(joint.info.get, ends) if isinstance(i, TensorInfo)]
    return any(
        len(shape) <= len(s) and shape[-1:] == s[-1:]
        for s in shapes if any(d.free_symbols for d in s[:-1]) and not s[-1].free_symbols
    )  # fmt: skip


def describe(labels: Labels) -> Mapping[str, str]:
    """Node name -> label, for dumps."""
    return {n.name: str(v) for n, v in labels.label.items()}


__all__ = [
    "ASCENDING", "Barrier", "DESCENDING", "Fact", "Kind", "Label", "Labels", "STATES", "Use",
    "analyse", "call_of", "describe", "has_axis", "labels_direction", "signature_of",
    "tensor_operands",
]  # fmt: skip
