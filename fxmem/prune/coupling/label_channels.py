"""The walk that labels channel axes, from the axis-signature table of :mod:`fxmem.rules`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxmem.axes.signature import Call, Signature, TensorInfo
from fxmem.axes.sizes import size
from fxmem.prune.coupling.channel_labels import Atom, Axis, fix, fresh, pick, resolve, root, unify
from fxmem.prune.coupling.match_norms import Average, match
from fxmem.prune.coupling.routers import Choice
from fxmem.rules import lookup
from fxmem.rules.arithmetic import layer_norm

SDPA = "scaled_dot_product"
SOFTMAX = "_softmax"
COMPOSITE = dict.fromkeys(("aten.layer_norm.default", "aten.rms_norm.default"), layer_norm)
"""Rules of ops that stay in a graph only where it cannot be decomposed."""


class Walk:
    """Labels of every value of one graph.

    ``contracted``: (origin parameter, atom) pairs; ``averaged``: axes that norms average over;
    ``looked_up``: axes along which a lookup reads; ``chosen``: axes of experts, each with the
    choice among them.
    """

    def __init__(self, model: nn.Module, choices: Mapping[fx.Node, Choice] | None = None) -> None:
        self.model = model
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
        self.heads: list[Axis] = []
        self.products: list[str] = []

    def source(self, node: fx.Node, reason: str) -> None:
        self.axes[node] = _map(node.meta.get("val"), lambda t: [fresh(n, reason) for n in t.shape])

    def parameter(self, node: fx.Node, name: str, axes: list[Axis]) -> None:
        self.axes[node] = axes
        self.origin[node] = name

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source = node.args[0]
            got = self.axes.get(source)
            self.axes[node] = got[node.args[1]] if isinstance(got, tuple) else None
            if self.axes[node] is None:
                self.source(node, f"{source} has no labels")
            if source in self.origin:
                self.origin[node] = self.origin[source]
            return
        if node.meta.get("val") is None:  # an assertion: nothing flows on from it
            self.axes[node] = None
            return
        op = str(node.target)
        operands = [n for n in node.all_input_nodes if isinstance(self.axes.get(n), list)]
        values = _operands(node)
        where = f"{op} in {_module(node)}"
        if SDPA in op:
            self._attention(node, values, where)
            return
        chosen = node in self.gathers or node in self.choices
        if chosen and self._choose(node, values, where):
            return
        call = _call(node, op)
        row = lookup(node.target)
        rule = row.rule if row is not None else COMPOSITE.get(op)
        signature = rule(call) if rule is not None and call is not None else None
        if signature is None or call is None:
            for n in operands:
                for axis in self.axes[n]:
                    fix(axis, f"{where} has no row in the axis table")
            self.source(node, f"{where} has no row in the axis table")
            return
        whole = f"{where} needs the axis whole"
        if node in self.open:
            signature = replace(signature, whole=frozenset())
        elif signature.whole:
            norm = match(node, self.origin, self.model, where)
            if isinstance(norm, str):
                whole = norm
            else:
                signature = replace(signature, whole=frozenset())
                self.averaged.append((self.axes[values[0]][-1], norm))
        if op == "aten.embedding.default" and values[0] in self.origin:
            self.looked_up.append(self.axes[values[0]][1])
        self._apply(node, values, signature, call, where, whole)
        if node in self.tied:
            weight = next(c.consumers[node] for c in self.choices.values() if node in c.consumers)
            unify(self.tied[node], self.axes[weight][0], where)
        if reason := self.refused.get(node):
            fix(self.axes[node][-1], f"{reason}, at {where}")
        if len(operands) == 1 and operands[0] in self.origin:
            self.origin[node] = self.origin[operands[0]]

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
        for other in (k, v):
            unify(q[0], other[0], where)
            if _len(other[1]) == _len(q[1]):
                unify(q[1], other[1], where)
            elif _len(q[1]) % _len(other[1]) == 0:
                group = Atom(_len(q[1]) // _len(other[1]))
                unify(q[1], tuple((*s, group) for s in resolve(other[1])), where)
        unify(q[3], k[3], where)
        unify(k[2], v[2], where)
        self.heads.append(q[1])
        out = [q[0], q[1], q[2], v[3]]
        val = node.meta["val"]
        if isinstance(val, torch.Tensor):
            self.axes[node] = out
        else:
            rest = [_map(t, lambda x: [fresh(n, where) for n in x.shape]) for t in val[1:]]
            self.axes[node] = (out, *rest)

    def _apply(
        self, node: fx.Node, values: list[fx.Node], sig: Signature, call: Call, where: str,
        whole: str,
    ) -> None:  # fmt: skip
        found: dict[str, list[tuple[Axis, fx.Node]]] = {}
        for n, dims in zip(values, sig.ins, strict=False):
            for axis, dim in zip(self.axes[n], dims or (), strict=False):
                self._operand(axis, dim, n, sig, found, where)
        outs: tuple[Any, ...] = sig.outs
        out_sizes: dict[str, list[int]] = {}
        for info, dims in zip(call.outs, outs, strict=False):
            if info is None or dims is None:
                continue
            for n, dim in zip(info.shape, dims, strict=False):
                if len(dim) == 1:
                    out_sizes.setdefault(dim[0], []).append(int(n))
        known: dict[str, list[Axis]] = {}
        for letter, entries in found.items():
            known[letter] = self._letter(letter, entries, out_sizes.get(letter), sig, where, whole)
            head = SOFTMAX in str(node.target) and node not in self.open
            if head and letter not in sig.whole:
                self.heads.append(entries[0][0])
        seen: dict[str, int] = {}
        results: list[list[Axis] | None] = []
        for info, dims in zip(call.outs, outs, strict=False):
            if info is None or dims is None:
                results.append(None)
                continue
            axes: list[Axis] = []
            for n, dim in zip(info.shape, dims, strict=False):
                if len(dim) > 1:
                    axes.append((tuple(a for x in dim for s in known[x][0] for a in s),))
                elif not dim:
                    axes.append(fresh(int(n)))
                elif dim[0] not in known:
                    known[dim[0]] = [fresh(int(n))]
                    axes.append(known[dim[0]][0])
                else:
                    choices = known[dim[0]]
                    i = seen.get(dim[0], 0)
                    seen[dim[0]] = i + 1
                    axes.append(choices[i] if len(choices) > 1 else choices[0])
            results.append(axes)
        single = isinstance(node.meta.get("val"), torch.Tensor)
        self.axes[node] = results[0] if single else tuple(results)

    def _operand(
        self, axis: Axis, dim: tuple[str, ...], n: fx.Node, sig: Signature,
        found: dict[str, list[tuple[Axis, fx.Node]]], where: str,
    ) -> None:  # fmt: skip
        if len(dim) == 1:
            found.setdefault(dim[0], []).append((axis, n))
        elif len(dim) > 1:
            parts = [Atom(int(sig.extent[x])) for x in dim]
            unify(axis, (tuple(parts),), where)
            for x, part in zip(dim, parts, strict=True):
                found.setdefault(x, []).append((((part,),), n))

    def _letter(
        self, letter: str, entries: list[tuple[Axis, fx.Node]], outs: list[int] | None,
        sig: Signature, where: str, whole: str,
    ) -> list[Axis]:  # fmt: skip
        first = entries[0][0]
        sizes = [_len(a) for a, _ in entries]
        if outs is None:  # gone: a contraction of two operands, or a reduction
            for other, _ in entries[1:]:
                unify(first, other, where)
            if len(entries) == 1 and letter in sig.whole:
                fix(first, whole)
            if len(entries) > 1:
                for axis, n in entries:
                    if n in self.origin:
                        self.products.append(self.origin[n])
                        self.contracted |= {(self.origin[n], a) for s in resolve(axis) for a in s}
            return [first]
        if (
            len(outs) == 1
            and len(entries) > 1
            and sum(sizes) == outs[0]
            and set(sizes) != {outs[0]}
        ):
            return [tuple(s for a, _ in entries for s in resolve(a))]
        if len(set(sizes)) == 1 and sizes[0] == sum(outs) and len(outs) > 1:
            return pick(first, tuple(outs))
        for other, _ in entries[1:]:
            unify(first, other, where)
        if all(n == sizes[0] for n in outs):
            if letter in sig.whole and letter not in sig.shift:
                fix(first, whole)
            return [first]
        start = sig.shift.get(letter)
        if start is not None and len(outs) == 1:
            lo, n = int(start), outs[0]
            parts = [x for x in (lo, n, sizes[0] - lo - n) if x]
            if not n:
                return [()]
            return [pick(first, tuple(parts))[1 if lo else 0]]
        fix(first, f"{where} changes the axis")
        return [fresh(outs[0], f"{where} changes the axis")]

    def mark_heads(self) -> None:
        for axis in self.heads:
            for segment in resolve(axis):
                for atom in segment:
                    root(atom).attention = True


def _len(axis: Axis) -> int:
    from fxmem.prune.coupling.channel_labels import length

    return length(axis)


def _map(value: Any, f: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, list | tuple):
        return tuple(_map(v, f) for v in value)
    return None


def _info(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorInfo(tuple(size(int(n)) for n in value.shape), value.dtype)
    return None


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(
        (node.args, node.kwargs),
        lambda n: found.append(n) if isinstance(n.meta.get("val"), torch.Tensor) else None,
    )
    return found


def _call(node: fx.Node, op: str) -> Call | None:
    def value(n: fx.Node) -> Any:
        val = n.meta.get("val")
        return _info(val) if isinstance(val, torch.Tensor) else val

    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    val = node.meta.get("val")
    outs = tuple(_info(v) for v in (val if isinstance(val, list | tuple) else (val,)))
    if not outs or outs[0] is None:
        return None
    return Call(op, tuple(args), dict(kwargs), outs)


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else "the model"
