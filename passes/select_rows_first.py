"""Select rows first: ``linear(x)[rows]`` becomes ``linear(x[rows])``.

An objective over some tokens (those of an answer, those of the right length) picks rows of what it
has made of the logits, a vocabulary wide. Where every step from the hidden states to there makes
each row from the same row, the rows of the hidden states are picked instead, which are narrow, and
the logits of other tokens are never made.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxmem.frontend.capture import Context, contexts_of, value_of
from fxmem.frontend.functional_writes import picked_rows
from fxmem.frontend.origin import name_of
from fxmem.passes.slice_rows_first import slices_rows
from fxmem.rewriting.pipeline import Edit, LocalPass, call_before

_POINTWISE = frozenset((
    "add", "sub", "mul", "div", "truediv", "true_divide", "neg", "pow", "exp", "log", "log1p",
    "log2", "abs", "square", "sqrt", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "max",
    "min", "where", "tanh", "sigmoid", "logsigmoid", "softplus", "nan_to_num", "xlogy", "lerp",
    "masked_fill", "rsqrt", "reciprocal", "relu", "gelu", "silu",
    "float", "double", "half", "bfloat16", "to", "type", "contiguous", "detach",
))  # fmt: skip
"""By name, as functions, operators or methods: entry by entry, with operands that broadcast."""
_LOSSES = frozenset(("kl_div", "mse_loss", "l1_loss", "binary_cross_entropy_with_logits"))
_NORMS = frozenset(("layer_norm", "rms_norm"))
_LAST = frozenset(("softmax", "log_softmax"))
_REDUCTIONS = frozenset(("logsumexp", "sum", "mean", "amax", "amin"))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which rows are picked of what has ``lead`` dimensions before its last: by an index of what
    ``steps`` (slices, and merges of dimensions) leave. ``wrap``: it may be negative.
    """

    index: fx.Node
    wrap: bool
    lead: int
    steps: list[fx.Node]

    def sizes(self, value: Tensor) -> list[str]:
        """Of these dimensions."""
        return [str(s) for s in value.shape[-1 - self.lead : -1]]


@dataclass(frozen=True, slots=True)
class SelectRowsFirst(LocalPass[fx.GraphModule]):
    """Rewrite picks by numbers that come from outside, of what is made of a linear layer's rows."""

    name: str = "select_rows_first"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        known: set[fx.Node] = set()
        while new := [n for n in gm.graph.nodes if n not in known]:  # a moved pick may move again
            known.update(new)
            for node in new:
                if (found := _picked(node)) is not None:
                    source, rows = found
                    cone, leaves = _cone(source, rows, {node, *rows.steps})
                    # before a norm that stands before the product, but not apart from its sum
                    if cone and (node.target is not picked_rows or len(leaves) == 1):
                        yield partial(_move, gm, node, rows, cone)


def _picked(node: fx.Node) -> tuple[fx.Node, _Rows] | None:
    """Of what a node picks which rows."""
    wrap = node.target is operator.getitem
    if node.target is picked_rows:
        source, index, wrap = node.args
    elif wrap or (name_of(node.target) == "index_select" and node.args[1:2] == (0,)):
        source, index = node.args[0], node.args[-1]
    else:
        return None
    value = value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 2 or not _is_given(index):
        return None
    steps: list[fx.Node] = []
    while _merges(source) or (slices_rows(source) and len(source.all_input_nodes) == 1):
        steps.insert(0, source)
        source = source.args[0]
    if any(user is not node and user not in steps for step in steps for user in step.users):
        return None
    return source, _Rows(index, wrap, value_of(source).dim() - 1, steps)


def _is_given(index: Any) -> bool:
    """Numbers of rows that come from outside."""
    known = isinstance(index, fx.Node) and index.op == "placeholder"
    value = value_of(index) if known else None
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1


def _merges(node: Any) -> bool:
    """A reshape to rows of what had more dimensions before its last, which stays."""
    if name_of(node.target) not in ("reshape", "view", "flatten", "contiguous"):
        return False
    source = node.args[0]
    value, before = value_of(node), value_of(source) if isinstance(source, fx.Node) else None
    return (
        isinstance(value, Tensor) and isinstance(before, Tensor)
        and value.dtype == before.dtype and value.dim() == 2 <= before.dim()
        and str(value.shape[-1]) == str(before.shape[-1])
    )  # fmt: skip


def _cone(source: fx.Node, rows: _Rows, users: set[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
    """The calls that make ``source`` row by row, in order, as far as nothing but these and
    ``users`` reads what they make, and what they take; none where that is more per row.
    """
    takes: dict[fx.Node, list[fx.Node]] = {}
    stack = [source]
    while stack:
        node = stack.pop()
        if node not in takes and (operands := _operands(node, rows)) is not None:
            takes[node] = operands
            stack += operands
    while read := [n for n in takes if any(u not in takes and u not in users for u in n.users)]:
        for node in read:
            del takes[node]
    leaves = {o for operands in takes.values() for o in operands if o not in takes}
    less = all(n.op == "placeholder" or _is_narrower(n, source) for n in leaves)
    if source not in takes or not (less or len(leaves) == 1):
        return [], leaves
    return [n for n in source.graph.nodes if n in takes], leaves


def _is_narrower(node: fx.Node, other: fx.Node) -> bool:
    sizes = [str(value_of(n).shape[-1]) for n in (node, other)]
    return all(s.isdigit() for s in sizes) and int(sizes[0]) < int(sizes[1])


def _operands(node: fx.Node, rows: _Rows) -> list[fx.Node] | None:
    """Those of which a call takes the same row as it makes; None where it is not of that kind."""
    value, name = value_of(node), name_of(node.target).strip("_")
    if node.op not in ("call_function", "call_method") or not isinstance(value, Tensor):
        return None
    if value.dim() <= rows.lead or not node.args:
        return None
    if node.target is F.linear:
        items: Any = node.args[:1] if value_of(node.args[0]).dim() == value.dim() else None
    elif name == "stack":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        items = node.args[0] if dim == 0 else None
    elif name in _POINTWISE:
        items = node.args
    elif name in _LOSSES:
        items = node.args[:2] if "none" in (*node.args, *node.kwargs.values()) else None
    else:
        items = node.args[:1] if _beside_rows(node, name, rows) else None
    return None if items is None else _alike(items, value, rows)


def _beside_rows(node: fx.Node, name: str, rows: _Rows) -> bool:
    """It goes along the last dimension, which stays, or along one before the rows."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if name in _NORMS:
        return isinstance(dim, (tuple, list)) and len(dim) == 1
    of = value_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if not isinstance(dim, int) or not isinstance(of, Tensor):
        return False
    dim -= of.dim() if dim >= 0 else 0
    kept = bool(node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2]))
    if name in _REDUCTIONS:
        return dim < -1 - rows.lead or (dim == -1 and kept)
    return name in _LAST and dim == -1


def _alike(items: Iterable[Any], value: Tensor, rows: _Rows) -> list[fx.Node] | None:
    """Those of some operands that have the rows; None where one has some of them."""
    found = []
    for item in items:
        of = value_of(item) if isinstance(item, fx.Node) else None
        if not isinstance(of, Tensor) or of.dim() < 2:
            continue
        sizes = rows.sizes(of)
        if len(sizes) == rows.lead and sizes == rows.sizes(value):
            found.append(item)
        elif any(s != "1" for s in sizes):
            return None
    return found


def _move(gm: fx.GraphModule, node: fx.Node, rows: _Rows, cone: list[fx.Node]) -> None:
    """Every call again on the rows, where it stands: autocast may end before ``node``."""
    contexts, _ = contexts_of(gm)
    made: dict[fx.Node, fx.Node] = {}
    picked: dict[tuple[fx.Node, bool], fx.Node] = {}  # with a gradient, or under no_grad
    for one in cone:
        own = dict(made)
        for leaf in _operands(one, rows) or ():
            key = leaf, contexts[one].grad
            if leaf not in made and key not in picked:
                picked[key] = _pick(leaf, rows, one, contexts[one])
            own[leaf] = made[leaf] if leaf in made else picked[key]
        args, kwargs = fx.map_arg((one.args, dict(one.kwargs)), partial(_found, own))
        made[one] = call_before(one, one.target, args, kwargs, like=one, context=contexts[one])
    now = made[cone[-1]]
    for _ in range(rows.lead - 1):
        now = call_before(node, torch.squeeze, (now, 0), like=node, context=contexts[node])
    node.replace_all_uses_with(now)
    for one in (node, *reversed(rows.steps), *reversed(cone)):
        gm.graph.erase_node(one)


def _found(made: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return made.get(node, node)


def _pick(leaf: fx.Node, rows: _Rows, at: fx.Node, context: Context) -> fx.Node:
    """Its rows, with as many dimensions as it has."""

    def call(target: Any, *args: Any) -> fx.Node:
        made = call_before(at, target, args, like=leaf, context=context)
        made.meta = at.meta | {"example_value": value_of(made)}
        return made

    found = leaf
    for step in rows.steps:
        sliced = step.target is operator.getitem
        target, *rest = (operator.getitem, step.args[1]) if sliced else (torch.flatten, 0, -2)
        found = call(target, found, *rest)
    found = call(picked_rows, found, rows.index, rows.wrap)
    for _ in range(rows.lead - 1):
        found = call(torch.unsqueeze, found, 0)
    return found
