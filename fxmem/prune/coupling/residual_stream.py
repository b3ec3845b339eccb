"""The residual stream: which axis it is, and that channels removed from it stay zero.

Masked equals sliced only if zeros written into the stream are zeros wherever it is read. Every op
between is checked against a short list of what keeps zeros; any other op fixes the axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxmem.prune.coupling.channel_labels import Atom, Axis, fix, leaves, resolve, root
from fxmem.prune.coupling.match_norms import FUSED, Average, odd_use
from fxmem.prune.coupling.products import KEEPS_ZERO
from fxmem.prune.units.units import Norm
from fxmem.rules import lookup

_UNARY = KEEPS_ZERO | {"embedding", "index", "index_select", "gather"}
"""Zero where the first operand is."""
_SUMS = {"add", "sub", "cat", "stack", "index_add", "scatter_add"}


def streams(
    averaged: list[tuple[Axis, Average]], looked_up: list[Axis], walk: Any, graph: fx.Graph
) -> dict[Atom, tuple[Norm, ...]]:
    """Atoms of residual streams (axes that embeddings are looked up along) -> their norms.

    Averages over any other axis, and streams that cannot shrink exactly, are fixed with the reason.
    """
    found: dict[Atom, list[Average]] = {}
    for axis in looked_up:
        atom = _sole(axis)
        if atom is not None and atom.size > 1:
            found.setdefault(atom, [])
    for axis, average in averaged:
        atom = _sole(axis)
        if atom in found and atom is not None:
            found[atom].append(average)
        else:
            fix(axis, average.why)
    for atom, averages in found.items():
        atom.fixed = atom.fixed or odd_use(averages, graph, walk.origin)
        atom.fixed = atom.fixed or _leak(atom, walk, graph)
    return {
        atom: tuple(dict.fromkeys(a.norm for a in averages))
        for atom, averages in found.items()
        if not atom.fixed
    }


def _sole(axis: Axis) -> Atom | None:
    opened = resolve(axis)
    if len(opened) != 1 or len(opened[0]) != 1:
        return None
    atom = root(opened[0][0])
    return atom if atom.ref is None else None


def _carries(labels: Any, atom: Atom) -> bool:
    if isinstance(labels, list):
        return any(atom in leaves(axis) for axis in labels)
    return isinstance(labels, tuple) and any(_carries(x, atom) for x in labels)


def _leak(atom: Atom, walk: Any, graph: fx.Graph) -> str | None:
    """Why removed positions of ``atom`` may be other than zero where they are read."""
    read = {name for name, a in walk.contracted if root(a) is atom}
    zero: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        out = _carries(walk.axes.get(node), atom)
        if node.op == "placeholder" and out:
            # The matrix that reads the stream is not masked; a tied one is where it writes.
            zero[node] = node not in walk.origin or not _only_read(node, walk, atom, read)
            continue
        if node.op != "call_function" or node.meta.get("val") is None:
            continue
        ins = [n for n in node.all_input_nodes if n in zero]
        if not ins:
            continue
        if out:
            zero[node] = _keeps(node, zero, atom, walk)
        elif not (any(zero[n] for n in ins) if len(ins) > 1 else zero[ins[0]]):
            return f"{node.target} ({node.name}) reads channels that are not zero when removed"
    return None


def _only_read(node: fx.Node, walk: Any, atom: Atom, read: set[str]) -> bool:
    if walk.origin[node] not in read:
        return False
    return sum(_carries([axis], atom) for axis in walk.axes[node]) == 1 and not any(
        "embedding" in str(u.target) for u in node.users
    )


def _keeps(node: fx.Node, zero: Mapping[fx.Node, bool], atom: Atom, walk: Any) -> bool:
    """Whether removed positions of the output are zero, from those of the operands."""
    op = str(node.target)
    name = op.split(".")[1] if op.startswith("aten.") else op
    carriers = [n for n in node.all_input_nodes if n in zero]
    first = node.args[0] if node.args else None
    if name == "mul" or (name in ("mm", "bmm", "mv") or "expert_linear" in op):
        return any(zero[n] for n in carriers)
    if name in ("addmm", "baddbmm"):
        return all(zero.get(n, False) for n in node.args[:1]) and any(
            zero.get(n, False) for n in node.args[1:3]
        )
    if name in ("add", "sub"):
        operands = node.args[:2]
        return all(isinstance(n, fx.Node) and zero.get(n, False) for n in operands)
    if name in _SUMS:
        return bool(carriers) and all(zero[n] for n in carriers)
    if name == "pow":
        power = node.args[1]
        return zero.get(first, False) and isinstance(power, int | float) and power > 0
    if name in _UNARY or op in FUSED or op == "<built-in function getitem>":
        return zero.get(first, False)
    row = lookup(node.target)
    return row is not None and row.linear == 0 and zero.get(first, False)
