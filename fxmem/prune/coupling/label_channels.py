"""The walk that labels channel axes, from the axis-signature table of :mod:`fxmem.rules`."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem.axes.signature import AxisRule, Call, Signature
from fxmem.prune.coupling.channel_labels import (
    Atom,
    Axis,
    fix,
    fresh,
    length,
    nested,
    pick,
    resolve,
    root,
    unify,
)
from fxmem.prune.coupling.graph_calls import (
    call_of,
    constant_slice,
    map_tensors,
    module_name,
    operands,
    strided_view,
)
from fxmem.prune.coupling.match_norms import Average, match
from fxmem.prune.coupling.products import is_call_of, keeps_zeros
from fxmem.prune.coupling.routers import Choice
from fxmem.rules import lookup, windows
from fxmem.rules.arithmetic import layer_norm

SDPA = "scaled_dot_product"
SOFTMAX = "_softmax"
COMPOSITE = dict.fromkeys(("aten.layer_norm.default", "aten.rms_norm.default"), layer_norm)
"""Rules of ops that stay in a graph only where it cannot be decomposed."""
_Entry = tuple[Axis, fx.Node, int]
"""An operand's axis, its node, and which operand it is."""


class Walk:
    """Labels of every value of one graph.

    ``contracted``: (origin parameter, atom) pairs; ``averaged``: axes that norms average over;
    ``looked_up``: axes along which a lookup reads; ``chosen``: axes of experts, each with the
    choice among them; ``unowned``: parameters that are multiplied elsewhere than by a call of
    their module; ``windows``: those of convolutions.
    """

    def __init__(
        self, model: nn.Module, choices: Mapping[fx.Node, Choice] | None = None,
        constants: Mapping[fx.Node, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.constants = constants or {}
        self.averaged: list[tuple[Axis, Average]] = []
        self.looked_up: list[Axis] = []
        self.choices = dict(choices or {})
        legal = [c for c in self.choices.values() if c.refused is None]
        self.open = {n for c in legal for n in (*c.scores, *c.consumers)}
        """Ops that may lose experts although they name the axis as one they need whole."""
        self.gathers = {n for c in legal for n in c.values}
        self.refused = {c.scores[0]: c.refused for c in self.choices.values() if c.routes}
        self.tied: dict[fx.Node, Axis] = {}
        self.chosen: list[tuple[Axis, Choice]] = []
        self.axes: dict[fx.Node, Any] = {}
        self.origin: dict[fx.Node, str] = {}
        self.contracted: set[tuple[str, Atom]] = set()
        self.unowned: set[str] = set()
        self.windows: set[str] = set()
        self.heads: list[Axis] = []
        self.products: defaultdict[str, float] = defaultdict(float)

    def source(self, node: fx.Node, reason: str) -> None:
        val = node.meta.get("val")
        self.axes[node] = map_tensors(val, lambda t: [fresh(n, reason) for n in t.shape])

    def leaf(self, node: fx.Node, axes: list[Axis], parameter: str | None = None) -> None:
        """A value that is cut where its axes lose positions: a parameter or a buffer."""
        self.axes[node] = axes
        if parameter is not None:
            self.origin[node] = parameter

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self._item(node)
            return
        if node.meta.get("val") is None:  # an assertion: nothing flows on from it
            self.axes[node] = None
            return
        op = str(node.target)
        values = operands(node)
        where = f"{op} in {module_name(node)}"
        if SDPA in op:
            self._attention(node, values, where)
            return
        chosen = node in self.gathers or node in self.choices
        if chosen and self._choose(node, values, where):
            return
        call = call_of(node, op)
        row = lookup(node.target)
        rule = row.rule if row is not None else COMPOSITE.get(op)
        signature = constant_slice(node, self.constants)
        if signature is None and call is not None:
            signature = rule(call) if rule is not None else strided_view(node, call)
        if signature is None or call is None:
            for n in node.all_input_nodes:
                for axis in self.axes[n] if isinstance(self.axes.get(n), list) else ():
                    fix(axis, f"{where} has no row in the axis table")
            self.source(node, f"{where} has no row in the axis table")
            return
        step = _Step(node, row, signature, call, where, f"{where} needs the axis whole")
        if node in self.open:
            step.allow()
        elif signature.whole:
            norm = match(node, self.origin, self.model, where)
            if isinstance(norm, str):
                step.whole = norm
            else:
                step.allow()
                self.averaged.append((self.axes[values[0]][-1], norm))
        if row is not None and row.product:
            self._count(step, values)
        if op == "aten.embedding.default" and values[0] in self.origin:
            self.looked_up.append(self.axes[values[0]][1])
        self._apply(step, values)
        if node in self.tied:
            weight = next(c.consumers[node] for c in self.choices.values() if node in c.consumers)
            unify(self.tied[node], self.axes[weight][0], where)
        if reason := self.refused.get(node):
            fix(self.axes[node][-1], f"{reason}, at {where}")
        if len(set(values)) == 1 and values[0] in self.origin and keeps_zeros(node):
            self.origin[node] = self.origin[values[0]]

    def _item(self, node: fx.Node) -> None:
        source = node.args[0]
        got = self.axes.get(source)
        self.axes[node] = got[node.args[1]] if isinstance(got, tuple) else None
        if self.axes[node] is None:
            self.source(node, f"{source} has no labels")
        if source in self.origin:
            self.origin[node] = self.origin[source]

    def _choose(self, node: fx.Node, values: list[fx.Node], where: str) -> bool:
        """Label a choice among experts, or the scores gathered at it; False where it is refused."""
        scores, choice = self.axes[values[0]], self.choices.get(node)
        if choice is None:
            index = self.axes[values[1]]
            for a, b in zip(scores[:-1], index[:-1], strict=True):
                unify(a, b, where)
            self.axes[node] = list(index)
            return True
        if choice.refused:
            fix(scores[-1], f"{choice.refused}, at {where}")
            return False
        out = [*scores[:-1], fresh(choice.chosen, "a position among the chosen experts")]
        self.axes[node] = (out, out)
        self.tied |= dict.fromkeys(choice.consumers, scores[-1])
        self.chosen.append((scores[-1], choice))
        return True

    def _attention(self, node: fx.Node, values: list[fx.Node], where: str) -> None:
        q, k, v = (self.axes[n] for n in values[:3])
        if len({len(q), len(k), len(v)}) > 1 or len(q) < 3:
            for axis in (*q, *k, *v):
                fix(axis, f"{where} broadcasts its operands")
            self.source(node, f"{where} broadcasts its operands")
            return
        for other in (k, v):
            for a, b in zip(q[:-3], other[:-3], strict=True):
                unify(a, b, where)
            heads = length(other[-3])
            if heads and length(q[-3]) % heads == 0 and length(q[-3]) != heads:
                group = Atom(length(q[-3]) // heads)
                unify(q[-3], tuple((*s, group) for s in resolve(other[-3])), where)
            else:
                unify(q[-3], other[-3], where)
        for mask in values[3:]:
            axes = self.axes[mask]
            if len(axes) > 2 and length(axes[-3]) > 1:
                unify(q[-3], axes[-3], where)
        unify(q[-1], k[-1], where)
        fix(q[-1], f"{where} multiplies two values along the axis")
        unify(k[-2], v[-2], where)
        if len(q) > 3:
            self.heads.append(q[-3])
        out = [*q[:-1], v[-1]]
        val = node.meta["val"]
        if isinstance(val, torch.Tensor):
            self.axes[node] = out
        else:
            rest = [map_tensors(t, lambda x: [fresh(n, where) for n in x.shape]) for t in val[1:]]
            self.axes[node] = (out, *rest)

    def _apply(self, step: _Step, values: list[fx.Node]) -> None:
        sig, outs = step.sig, step.call.outs
        found: dict[str, list[_Entry]] = {}
        for at, (n, dims) in enumerate(zip(values, sig.ins, strict=False)):
            for axis, dim in zip(self.axes[n], dims or (), strict=False):
                if len(dim) == 1:
                    found.setdefault(dim[0], []).append((axis, n, at))
                elif dim:
                    parts = [Atom(int(sig.extent[x])) for x in dim]
                    unify(axis, (tuple(parts),), step.where)
                    for x, part in zip(dim, parts, strict=True):
                        found.setdefault(x, []).append((((part,),), n, at))
        lengths: dict[str, list[int]] = {}
        for info, made in zip(outs, sig.outs, strict=False):
            for n, dim in zip(info.shape if info else (), made or (), strict=False):
                for x in dim:
                    lengths.setdefault(x, []).append(int(n if len(dim) == 1 else sig.extent[x]))
        known: dict[str, list[Axis]] = {}
        for letter, entries in found.items():
            known[letter] = self._letter(step, letter, entries, lengths.get(letter))
            head = SOFTMAX in step.op and step.node not in self.open
            if head and letter not in sig.whole:
                self.heads.append(entries[0][0])
        results = _outputs(step, known)
        single = isinstance(step.node.meta.get("val"), torch.Tensor)
        self.axes[step.node] = results[0] if single else tuple(results)

    def _count(self, step: _Step, values: list[fx.Node]) -> None:
        """Rows that parameters are multiplied with: multiply-adds per entry of the weight."""
        assert step.row is not None and step.row.product is not None
        for at in step.row.product:
            if name := self.origin.get(values[at]):
                weight = {x for d in step.sig.ins[at] for x in d}
                held = values[at].meta["val"].numel() / self.model.get_parameter(name).numel()
                self.products[name] += held * prod(  # the weight may be expanded, or a part
                    int(n)
                    for n, dim in zip(step.call.out.shape, step.sig.outs[0] or (), strict=True)
                    if not weight.intersection(dim)
                )
                self.windows |= {name} if step.op in windows.ROWS else set()

    def _letter(
        self, step: _Step, letter: str, entries: list[_Entry], outs: list[int] | None
    ) -> list[Axis]:
        first, sig, where = entries[0][0], step.sig, step.where
        sizes = [length(a) for a, _, _ in entries]
        if outs is None:
            self._contract(step, letter, entries)
            return [first]
        if len(outs) == 1 and len(entries) > 1 and sum(sizes) == outs[0] not in sizes:
            return [tuple(s for a, _, _ in entries for s in resolve(a))]
        if len(set(sizes)) == 1 and sizes[0] == sum(outs) and len(outs) > 1:
            return pick(first, tuple(outs))
        for other, _, _ in entries[1:]:
            unify(first, other, where)
        if letter in sig.carried or letter in sig.whole - sig.counts - sig.shift.keys():
            fix(first, step.whole)
        if all(n == sizes[0] for n in outs):
            return [first]
        start = sig.shift.get(letter)
        if start is not None and len(outs) == 1 and len(set(sizes)) == 1:
            lo, n = int(start), outs[0]
            parts = [x for x in (lo, n, sizes[0] - lo - n) if x]
            if not n:
                return [()]
            return [pick(first, tuple(parts))[1 if lo else 0]]
        fix(first, f"{where} changes the axis")
        return [fresh(n, f"{where} changes the axis") for n in outs]

    def _contract(self, step: _Step, letter: str, entries: list[_Entry]) -> None:
        """The axis ends here. Removed positions are zero in products with parameters alone."""
        first = entries[0][0]
        for other, _, _ in entries[1:]:
            unify(first, other, step.where)
        if letter in step.allowed:
            return
        pair = step.row.product if step.row is not None else None
        places = sorted(at for _, _, at in entries)
        if pair is None or places != sorted(pair):
            fix(first, step.whole if letter in step.sig.whole else f"{step.where} reads all of it")
            return
        read = [(axis, n, entries[1 - i][1]) for i, (axis, n, _) in enumerate(entries)]
        read = [x for x in read if x[1] in self.origin]
        if not read:
            fix(first, f"{step.where} multiplies two values along the axis")
        for axis, n, value in read:
            name = self.origin[n]
            self.contracted |= {(name, a) for s in resolve(axis) for a in s}
            if not is_call_of(self.model, name, step.node, value):
                self.unowned.add(name)

    def mark_heads(self) -> None:
        for axis in self.heads:
            for segment in resolve(axis):
                for atom in segment:
                    root(atom).attention = True


@dataclass
class _Step:
    """One op of the walk.

    Attributes:
        sig: its signature. whole: why the axes that it needs whole are so.
        allowed: letters that it may lose positions of although the table says whole.
    """

    node: fx.Node
    row: AxisRule | None
    sig: Signature
    call: Call
    where: str
    whole: str
    allowed: frozenset[str] = frozenset()

    @property
    def op(self) -> str:
        return str(self.node.target)

    def allow(self) -> None:
        self.allowed = self.sig.whole
        self.sig = replace(self.sig, whole=frozenset())


def _outputs(step: _Step, known: dict[str, list[Axis]]) -> list[list[Axis] | None]:
    """Labels of the results, from those of the letters."""
    seen: dict[str, int] = {}

    def label(n: int, dim: tuple[str, ...]) -> Axis:
        if len(dim) > 1:
            return nested([known[x][0] for x in dim])
        if not dim:
            return fresh(n)
        if dim[0] not in known:
            made = dim[0] in step.sig.whole
            known[dim[0]] = [fresh(n, f"{step.where} makes the axis" if made else None)]
        several = known[dim[0]]
        seen[dim[0]] = seen.get(dim[0], -1) + 1
        return several[min(seen[dim[0]], len(several) - 1)]

    results: list[list[Axis] | None] = []
    for info, dims in zip(step.call.outs, step.sig.outs, strict=False):
        axes = []
        for n, dim in zip(info.shape if info else (), dims or (), strict=False):
            axis = label(int(n), dim)
            if length(axis) != int(n):
                fix(axis, f"{step.where} changes the axis")
                axis = fresh(int(n), f"{step.where} changes the axis")
            axes.append(axis)
        results.append(axes if info and dims is not None else None)
    return results
