"""Causal convolutions: over each token and those before it, as one op that hands a few rows on.

They are written as a convolution that pads both ends, less the rows behind the last token, or as
one or several without padding of a value that was padded in front, once for all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxmem.axes.sizes import same, size
from fxmem.frontend.capture import contexts_of, value_of
from fxmem.kernels.carried import causal_convolution
from fxmem.passes.windows import zeros_in_front
from fxmem.rewriting.pipeline import Edit, LocalPass, call_before


@dataclass(frozen=True, slots=True)
class CausalConvolutions(LocalPass[fx.GraphModule]):
    """Rewrite convolutions of one axis in both spellings."""

    name: str = "causal_convolutions"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        for node in list(gm.graph.nodes):
            found = _read(node) if node.target is torch.conv1d else None
            if found is None:
                continue
            chain = _chain(found)
            padded = _padded_in_front(chain)
            if padded is not None:
                yield partial(_rewrite, gm, [node], chain, padded)
            elif found.padding == found.reach and node.users:
                ends = [u for u in node.users if _drops_the_end(u, found)]
                if len(ends) == len(node.users):
                    yield partial(_rewrite, gm, ends, [found], found.x)


_DEFAULTS = {
    "input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1,
    "groups": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Convolution:
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: Any
    padding: int
    dilation: int
    groups: int
    reach: int
    """Rows before its own that a result sees."""


def _read(node: fx.Node) -> _Convolution | None:
    given = {**_DEFAULTS, **dict(zip(_DEFAULTS, node.args, strict=False)), **node.kwargs}
    x, weight, bias, *numbers = given.values()
    stride, padding, dilation, groups = (
        n[0] if isinstance(n, (tuple, list)) and len(n) == 1 else n for n in numbers
    )
    plain = all(isinstance(n, int) for n in (stride, padding, dilation, groups))
    if not plain or stride != 1 or value_of(x).dim() != 3:
        return None
    width = value_of(weight).shape[2]
    reach = (width - 1) * dilation if isinstance(width, int) else 0
    if not reach or not isinstance(value_of(x).shape[2], torch.SymInt):
        return None
    return _Convolution(node, x, weight, bias, padding, dilation, groups, reach)


def _chain(conv: _Convolution) -> list[_Convolution]:
    """Convolutions without padding of one another, up to ``conv``."""
    chain = [conv]
    while chain[0].padding == 0 and chain[0].x.target is torch.conv1d:
        before = _read(chain[0].x)
        if before is None or before.padding != 0:
            break
        chain.insert(0, before)
    return chain


def _padded_in_front(chain: Sequence[_Convolution]) -> fx.Node | None:
    """What was padded with as many zeros as the kernels reach back together."""
    if chain[0].padding != 0:
        return None
    found = zeros_in_front(chain[0].x)
    rows = sum(c.reach for c in chain)
    return found[0] if found is not None and found[1:] == (2, rows) else None


def _drops_the_end(user: fx.Node, conv: _Convolution) -> bool:
    """``y[..., :T]``: of all rows those that ``x`` has."""
    if user.target is not operator.getitem or user.args[0] is not conv.node:
        return False
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    *others, last = index
    plain = all(i is Ellipsis or i == slice(None) for i in others)
    full = len([i for i in others if i is not Ellipsis]) == 2 or Ellipsis in others
    if not plain or not full or not isinstance(last, slice) or last.step not in (None, 1):
        return False
    rows = (value_of(n).shape[-1] for n in (user, conv.x))
    return last.start in (None, 0) and same(*(size(r) for r in rows))


def _rewrite(
    gm: fx.GraphModule, nodes: list[fx.Node], chain: Sequence[_Convolution], x: fx.Node
) -> None:
    conv = chain[-1]
    steps = [(c.weight, c.bias, c.dilation, c.groups) for c in chain]
    context = contexts_of(gm)[0][conv.node]
    for node in nodes:
        new = call_before(node, convolved, (x, steps), like=conv.node, context=context)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    if not conv.node.users and conv.node not in nodes:
        gm.graph.erase_node(conv.node)


def convolved(x: Tensor, steps: Sequence[tuple[Tensor, Tensor | None, int, int]]) -> Tensor:
    """Convolutions of ``x`` with enough zeros in front for all; a step is ``(weight, bias,
    dilation, groups)``.

    Before the first token a convolution makes its bias of zeros, and the next one sees that. As it
    is linear, it may see zeros instead, and ``x`` less that bias.
    """
    edge: Tensor | None = None
    for weight, bias, dilation, groups in steps:
        seen = x if edge is None else x - edge[:, None]
        x = causal_convolution(seen, weight, bias, dilation, groups)
        if edge is not None:
            each = weight.sum(2).unflatten(0, (groups, -1)) * edge.view(groups, 1, -1)
            edge = each.sum(-1).flatten()
            x = x + edge[:, None].to(x.dtype)
        if bias is not None:
            edge = bias if edge is None else edge + bias
    return x
