"""Routers: scores over experts of which the best k are chosen, found in a graph by their dataflow.

An axis of experts may lose positions exactly if nothing reads it but the choice itself. That holds
for a product with a parameter whose result passes only ops that keep a removed expert, of score
minus infinity, below every other one and out of every sum, then one ``topk``, whose positions only
index parameters. Everything else makes the axis unprunable, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

LAYOUT = {
    f"aten.{name}.default"
    for name in (
        "view", "_unsafe_view", "reshape", "clone", "contiguous", "detach", "alias", "_to_copy",
        "lift_fresh_copy",
    )
}  # fmt: skip
INDEX_LAYOUT = LAYOUT | {
    f"aten.{name}"
    for name in (
        "expand.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "permute.default",
        "transpose.int", "slice.Tensor", "select.int", "t.default",
    )
}  # fmt: skip
PRODUCTS = {
    "aten.mm.default": 1, "aten.addmm.default": 2, "aten.linear.default": 1,
}  # fmt: skip
"""Products -> position of the weight whose rows or columns are the experts."""
CONSUMERS = {"fxmem.expert_linear.default": (1, 2), "aten.embedding.default": (0, 1)}
"""Ops that pick rows of a parameter -> positions of parameter and index."""


@dataclass(frozen=True)
class Choice:
    """One ``topk`` over experts.

    Attributes:
        chosen: experts per token.
        scores: nodes from the product to the operand of ``topk``.
        weight: node of the product's weight.
        values: gathers of scores at the chosen positions.
        consumers: ops that index a parameter by the chosen positions -> the parameter's node.
        outputs: those of `consumers` whose result no other of them reads.
        refused: why the experts cannot be pruned, or None.
    """

    chosen: int
    scores: tuple[fx.Node, ...]
    weight: fx.Node | None
    values: tuple[fx.Node, ...]
    consumers: dict[fx.Node, fx.Node]
    outputs: tuple[fx.Node, ...]
    refused: str | None

    @property
    def routes(self) -> bool:
        """Whether the scores begin with a product over as many experts as are chosen from."""
        if not self.scores or str(self.scores[0].target) not in PRODUCTS:
            return False
        return len({int(n.meta["val"].shape[-1]) for n in self.scores}) == 1


def choices(graph: fx.Graph) -> dict[fx.Node, Choice]:
    """Every ``topk`` along the last axis of its operand, with what is known of it."""
    return {n: _choice(n) for n in graph.nodes if str(n.target) == "aten.topk.default"}


def _choice(topk: fx.Node) -> Choice:
    chosen = topk.args[1]
    index, consumers, values, refused = _positions(topk)
    chain, weight, why = _scores(topk)
    refused = refused or why
    allowed = {*chain, topk, *values}
    for node in chain:
        refused = refused or _stray(node, allowed, "the router's scores")
    for node in [*_constants(chain), *consumers.values()]:
        refused = refused or _own(node, {*chain, *consumers})
    if any(n.args[0] not in chain or n.args[2] not in index for n in values):
        refused = refused or "aten.gather.default reads other values at the chosen positions"
    if not consumers:
        refused = refused or "no parameter is indexed by the chosen positions"
    if type(chosen) is not int:
        refused, chosen = refused or f"{topk.target} chooses a number that is not fixed", 1
    outputs = _outputs(topk, consumers)
    return Choice(chosen, tuple(chain), weight, tuple(values), consumers, outputs, refused)


def _outputs(topk: fx.Node, consumers: dict[fx.Node, fx.Node]) -> tuple[fx.Node, ...]:
    above: dict[fx.Node, set[fx.Node]] = {}
    inner: set[fx.Node] = set()
    left, node = set(consumers), topk
    while left:
        node = node.next
        above[node] = {c for n in node.all_input_nodes for c in above.get(n, ())}
        if node in left:
            inner |= above[node]
            above[node].add(node)
            left.remove(node)
    return tuple(c for c in consumers if c not in inner)


def _constants(chain: list[fx.Node]) -> list[fx.Node]:
    """What the scores are made of beside the product's first operand: weight and biases."""
    if not chain or str(chain[0].target) not in PRODUCTS:
        return []
    x = chain[0].args[1 if "addmm" in str(chain[0].target) else 0]
    return [n for step in chain for n in step.all_input_nodes if n not in chain and n is not x]


def _own(node: fx.Node, readers: set[fx.Node]) -> str | None:
    """Why ``node`` is not a parameter that only ``readers`` read."""
    while str(node.target) in INDEX_LAYOUT and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.op != "placeholder":
        return f"{node.target} makes a weight of the experts or of their router"
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if str(user.target) in INDEX_LAYOUT:
                todo.append(user)
            elif user not in readers and user.meta.get("val") is not None:
                return f"{user.target} reads {node.name} too"
    return None


def _stray(node: fx.Node, allowed: set[fx.Node], what: str) -> str | None:
    for user in node.users:
        if user not in allowed and user.meta.get("val") is not None:
            return f"{user.target} reads {what} too"
    return None


def _positions(
    topk: fx.Node,
) -> tuple[set[fx.Node], dict[fx.Node, fx.Node], list[fx.Node], str | None]:
    """Nodes that hold chosen positions; the ops that use them; a reason against."""
    index: set[fx.Node] = set()
    consumers: dict[fx.Node, fx.Node] = {}
    values: list[fx.Node] = []
    todo = [u for u in topk.users if u.args[1:] == (1,)]
    while todo:
        node = todo.pop()
        index.add(node)
        for user in node.users:
            op = str(user.target)
            at = CONSUMERS.get(op)
            if user.meta.get("val") is None:
                continue  # an assertion
            if op in INDEX_LAYOUT and not _dtype(user).is_floating_point:
                todo.append(user)
            elif at and user.args[at[1]] is node and user.args[at[0]] is not node:
                consumers[user] = user.args[at[0]]
            elif op == "aten.gather.default" and user.args[2] is node and _last(user, 1):
                values.append(user)
            else:
                return index, consumers, values, f"{op} reads which experts are chosen"
    return index, consumers, values, None


def _scores(topk: fx.Node) -> tuple[list[fx.Node], fx.Node | None, str | None]:
    """Nodes from the router's product to ``topk``, the weight's node, a reason against."""
    if not _last(topk, 2) or (len(topk.args) > 3 and topk.args[3] is False):
        return [], None, f"{topk.target} is not the largest along the last axis"
    chain: list[fx.Node] = []
    node = topk.args[0]
    while str(node.target) not in PRODUCTS:
        chain.insert(0, node)
        if str(node.target) not in LAYOUT | _STEPS or not isinstance(node.args[0], fx.Node):
            return chain, None, f"{node.target} makes the scores that experts are chosen by"
        node = node.args[0]
    chain.insert(0, node)
    experts = int(node.meta["val"].shape[-1])
    probability = False
    for step in chain[1:]:
        if int(step.meta["val"].shape[-1]) != experts or not _dtype(step).is_floating_point:
            return chain, None, f"{step.target} regroups the experts"
        why = _step(step, probability)
        if why:
            return chain, None, why
        probability |= str(step.target) in _TO_PROBABILITY
    return chain, node.args[PRODUCTS[str(node.target)]], None


_TO_PROBABILITY = {"aten._softmax.default", "aten.softmax.int", "aten.sigmoid.default"}
_SCALE = {"aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"}
_STEPS = _TO_PROBABILITY | _SCALE | {"aten.add.Tensor"}


def _step(node: fx.Node, probability: bool) -> str | None:
    """Why ``node`` may change which of the other experts are chosen, or how much each counts.

    A removed expert's score is minus infinity before softmax or sigmoid and zero after it, and the
    others' are above it; the steps that pass keep both so.
    """
    op = str(node.target)
    if op in LAYOUT:
        return None
    if op in _TO_PROBABILITY:
        if probability:
            return f"{op} follows another normalisation of the router's scores"
        return None if "sigmoid" in op or _last(node, 1) else f"{op} is not over the experts"
    other = node.args[1]
    if op in _SCALE:
        good = isinstance(other, int | float) and other > 0
        return None if good else f"{op} scales the router's scores by what may not be positive"
    if probability:
        return f"{op} corrects the router's scores after they are normalised"
    return None


def _last(node: fx.Node, position: int) -> bool:
    """Whether the axis that argument ``position`` names (default: the last) is the last one."""
    rank = node.args[0].meta["val"].dim()
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", -1)
    return dim in (-1, rank - 1)


def _dtype(node: fx.Node) -> Any:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, torch.Tensor) else torch.float32
