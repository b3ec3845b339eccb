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

The rules come from :mod:`fxmem.rules`; whatever a row does not allow is a *barrier*: the op runs
whole and exact, and :class:`Barrier` says why.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import fx

from fxmem.axes import AxisRule, Call, Cut, Signature, TensorInfo, axis_cuts, locate, place
from fxmem.capture import canonical, is_wide, module_path, source_line
from fxmem.joint import Joint
from fxmem.rules import lookup
from fxmem.sizes import Size, T, divide, has_axis, product, same

ASCENDING, DESCENDING = 1, -1


class Kind(Enum):
    STRAIGHT = "straight"
    FLEX = "flex"
    CUT = "cut"
    PARTIAL = "partial"


@dataclass(frozen=True, slots=True)
class Label:
    kind: Kind
    stage: int = 0
    cut: Cut | None = None
    suffix: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """How a node uses one tensor operand: whole (``cut`` is None) or its chunk under ``cut``."""

    operand: fx.Node
    cut: Cut | None
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Barrier:
    """An op that had to run whole although a cut value reaches it."""

    node: fx.Node
    op: str
    reason: str
    module: str | None
    source: str | None
    shape: tuple[Size, ...]


@dataclass(slots=True)
class Labels:
    joint: Joint
    directions: tuple[int, ...]
    label: dict[fx.Node, Any] = field(default_factory=dict)
    uses: dict[fx.Node, tuple[Use, ...]] = field(default_factory=dict)
    barriers: list[Barrier] = field(default_factory=list)
    masked: list[fx.Node] = field(default_factory=list)

    def of(self, node: fx.Node) -> Label:
        label = self.label[node]
        assert isinstance(label, Label), node
        return label


ATTENTION = {"fxmem.attention.default": (3, 4), "fxmem.attention_backward.default": (6, 7)}
"""Positions of (mask, causal) in the arguments of the canonical attention ops."""


def call_of(node: fx.Node, joint: Joint) -> Call:
    """The call of a node: :class:`TensorInfo` for tensors and sizes for SymInts."""

    def convert(a: fx.Node) -> Any:
        info = joint.info[a]
        return canonical(a.meta["val"], joint.symbols) if info is None else info

    args, kwargs = fx.map_arg((node.args, node.kwargs), convert)
    info = joint.info[node]
    return Call(str(node.target), tuple(args), kwargs, info if isinstance(info, tuple) else (info,))


def tensor_operands(node: fx.Node, joint: Joint) -> list[fx.Node]:
    """Tensor operands in argument order, repeats included."""
    found: list[fx.Node] = []
    fx.map_arg(
        (node.args, node.kwargs), lambda a: found.append(a) if joint.info[a] is not None else None
    )
    return found


def analyse(joint: Joint, *, causal: bool, directions: Sequence[int] = ()) -> Labels:
    """Label every node.

    ``causal``: attention masks are known to hide later keys; ``directions`` are one per loop.
    """
    labels = Labels(joint, tuple(directions))
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
    call = call_of(node, labels.joint)
    row = lookup(node.target)
    operands = tensor_operands(node, labels.joint)
    if call.op in ATTENTION:
        call = _attention_call(labels, node, call, causal)
    signature = row.rule(call) if row is not None else None
    if signature is not None and len(signature.ins) != len(operands):
        signature = None
    wide = any(o is not None and _streams(labels, node, o) for o in call.outs)
    outcome = _decide(labels, call, row, signature, operands, wide)
    if outcome is None:
        _barrier(
            labels,
            node,
            call,
            operands,
            "it has no row" if signature is None else "its axis is needed complete",
        )
        return
    labels.label[node], labels.uses[node] = outcome


def _streams(labels: Labels, node: fx.Node, info: TensorInfo) -> bool:
    """The value is to be cut if it can be."""
    if node in labels.joint.learned:
        return any(has_axis(d) for d in info.shape)
    return is_wide(info.shape)


def _attention_call(labels: Labels, node: fx.Node, call: Call, causal: bool) -> Call:
    mask, flag = ATTENTION[call.op]
    queries = labels.joint.info[node.args[0]].shape[-2]
    if node.args[mask] is None or not has_axis(queries):  # chunks of the batch read it as it is
        return call
    if labels.of(node.args[mask]).kind in (Kind.STRAIGHT, Kind.FLEX):
        labels.masked.append(node)
        return replace(call, args=(*call.args[:flag], causal, *call.args[flag + 1 :]))
    return call


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
    options = _options(labels, call, signature, operands, given)
    flex = row.cheap and len(call.outs) == 1 and (len(options) != 1 or not operands)
    if flex and not is_cut and (options or not operands or wide):
        stage = max((_ready(labels, g, None) for g in given), default=0)
        return Label(Kind.FLEX, stage), tuple(Use(o, None) for o in operands)
    for option in sorted(options, key=lambda o: (o.conflicts, o.contracts)):
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
    for option in _options(labels, call, signature, operands, given):
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


@dataclass(frozen=True, slots=True)
class _Option:
    """Cut the call along ``letter``; ``cuts`` per operand (None: whole)."""

    letter: str
    relative: Cut
    cuts: tuple[Cut | None, ...]
    conflicts: int
    contracts: bool


def _options(
    labels: Labels, call: Call, sig: Signature, operands: list[fx.Node], given: list[Label]
) -> list[_Option]:
    found: dict[str, _Option] = {}
    any_cut = any(g.kind is Kind.CUT for g in given)
    for i, label in enumerate(given):
        shape = call.tensors[i].shape
        cuts: tuple[Cut, ...]
        if any_cut:
            cuts = (label.cut,) if label.cut is not None and label.kind is Kind.CUT else ()
        else:
            cuts = axis_cuts(shape)
        for cut in cuts:
            at = locate(sig.ins[i], shape, cut, sig.extent) if sig.ins[i][cut.dim] else None
            if at is None or at[0] in sig.whole or at[0] in found:
                continue
            option = _option(call, sig, given, *at)
            if option is not None:
                found[at[0]] = option
    return list(found.values())


def _option(
    call: Call, sig: Signature, given: list[Label], letter: str, relative: Cut
) -> _Option | None:
    cuts: list[Cut | None] = []
    conflicts = 0
    for i, label in enumerate(given):
        cut = place(letter, relative, sig.ins[i], sig.extent)
        shape = call.tensors[i].shape
        if cut is not None and not same(
            shape[cut.dim], product((cut.outer, cut.length, cut.inner))
        ):
            return None
        cuts.append(cut)
        if label.kind is Kind.CUT and (cut is None or cut != label.cut):
            conflicts += 1
    contracts = not any(d is not None and any(letter in x for x in d) for d in sig.outs)
    return _Option(letter, relative, tuple(cuts), conflicts, contracts)


def _apply(
    labels: Labels,
    call: Call,
    sig: Signature,
    operands: list[fx.Node],
    given: list[Label],
    option: _Option,
) -> tuple[Any, tuple[Use, ...]] | None:
    uses = []
    for i, (operand, cut) in enumerate(zip(operands, option.cuts, strict=True)):
        if cut is not None and given[i].kind is Kind.FLEX and not can_slice(labels, operand, cut):
            cut = None
        uses.append(Use(operand, cut, prefix=i in sig.prefix))
    if not any(u.cut is not None for u in uses):
        return None
    stage = max(_ready(labels, g, u) for g, u in zip(given, uses, strict=True))
    outs = [_output(sig, option, i, info, stage) for i, info in enumerate(call.outs)]
    if any(o is False for o in outs):
        return None
    return (outs[0] if len(outs) == 1 else tuple(outs)), tuple(uses)


def _output(
    sig: Signature, option: _Option, index: int, info: TensorInfo | None, stage: int
) -> Any:
    """Label of one output; None where it does not exist, False where this option cannot make it."""
    dims = sig.outs[index]
    if info is None or dims is None:
        return None
    cut = place(option.letter, option.relative, dims, sig.extent)
    if cut is None:
        if any(option.letter in d for d in dims) or not sig.sums:
            return False
        return Label(Kind.PARTIAL, stage, suffix=index in sig.suffix)
    if option.letter in sig.shift:
        shifted = _shifted(cut, sig.shift[option.letter], info.shape[cut.dim])
        return False if shifted is None else Label(Kind.CUT, stage, shifted)
    if not same(info.shape[cut.dim], product((cut.outer, cut.length, cut.inner))):
        return False
    return Label(Kind.CUT, stage, cut)


def _shifted(cut: Cut, shift: Size, dim: Size) -> Cut | None:
    """The cut after rows moved by ``shift``; None where rows would leave the streamed axis."""
    length = divide(dim, product((cut.outer, cut.inner)))
    if length is None or (cut.outer, cut.inner) != (1, 1):
        return cut if length is not None and same(length, cut.length) and shift == 0 else None
    offset = product((cut.offset + shift,))
    inside = offset.is_nonnegative and product((T - offset - length,)).is_nonnegative
    return Cut(cut.dim, length, offset) if inside else None


def _ready(labels: Labels, label: Label, use: Use | None) -> int:
    """The first stage at which the use can be served."""
    chunk = use is not None and use.cut is not None
    if label.kind is Kind.CUT and not (chunk and use is not None and use.cut == label.cut):
        fused = (
            use is not None and use.prefix and labels_direction(labels, label.stage) == ASCENDING
        )
        return label.stage if fused else label.stage + 1
    if label.kind is Kind.PARTIAL:
        fused = label.suffix and chunk and labels_direction(labels, label.stage) == DESCENDING
        return label.stage if fused else label.stage + 1
    return label.stage


def labels_direction(labels: Labels, stage: int) -> int:
    return labels.directions[stage] if stage < len(labels.directions) else ASCENDING


def slices(labels: Labels, node: fx.Node, cut: Cut) -> tuple[Cut | None, ...] | None:
    """Operand cuts of a FLEX node for its slice ``cut``; None where it cannot be sliced so."""
    row, call = lookup(node.target), call_of(node, labels.joint)
    sig = row.rule(call) if row is not None else None
    if sig is None or sig.outs[0] is None or not sig.outs[0][cut.dim]:
        return None
    at = locate(sig.outs[0], call.out.shape, cut, sig.extent)
    if at is None or at[0] in sig.whole or at[0] in sig.shift:
        return None
    out: list[Cut | None] = []
    for info, dims in zip(call.tensors, sig.ins, strict=True):
        c = place(at[0], at[1], dims, sig.extent)
        if c is not None and not same(info.shape[c.dim], product((c.outer, c.length, c.inner))):
            return None
        out.append(c)
    return tuple(out)


def can_slice(labels: Labels, node: fx.Node, cut: Cut) -> bool:
    if labels.of(node).kind is not Kind.FLEX:
        return True
    cuts = slices(labels, node, cut)
    if cuts is None:
        return False
    operands = tensor_operands(node, labels.joint)
    return all(c is None or can_slice(labels, o, c) for o, c in zip(operands, cuts, strict=True))


def _barrier(
    labels: Labels, node: fx.Node, call: Call, operands: list[fx.Node], reason: str
) -> None:
    given = [labels.of(o) for o in operands]
    labels.label[node], labels.uses[node] = _straight(labels, call, operands, given)
    shape = next((o.shape for o in call.outs if o is not None), ())
    labels.barriers.append(
        Barrier(node, call.op, reason, module_path(node), source_line(node), shape)
    )


def describe(labels: Labels) -> Mapping[str, str]:
    """Node name -> label, for dumps."""
    return {n.name: str(v) for n, v in labels.label.items()}


__all__ = [
    "ASCENDING", "ATTENTION", "Barrier", "DESCENDING", "Kind", "Label", "Labels", "Use", "analyse",
    "call_of", "can_slice", "describe", "has_axis", "labels_direction", "slices",
    "tensor_operands", "torch",
]  # fmt: skip
