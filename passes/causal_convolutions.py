"""Causal convolutions: over each token and those before it, as one op that hands a few rows on.

They are written as a convolution that pads both ends, less the rows behind the last token, or as
one without padding of a value that was padded in front.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxmem.axes.sizes import same, size
from fxmem.frontend.capture import contexts_of, value_of
from fxmem.kernels.carried import causal_convolution
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
            padded = _padded_in_front(found)
            if padded is not None:
                yield partial(_rewrite, gm, [node], found, padded)
            elif found.padding == found.reach and node.users:
                ends = [u for u in node.users if _drops_the_end(u, found)]
                if len(ends) == len(node.users):
                    yield partial(_rewrite, gm, ends, found, found.x)


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


def _padded_in_front(conv: _Convolution) -> fx.Node | None:
    """What was padded with as many zeros as the kernel reaches back."""
    pad: Any = conv.x
    if conv.padding != 0 or getattr(pad.target, "__name__", "") != F.pad.__name__ or pad.kwargs:
        return None
    rest: tuple[Any, ...] = (None, None, "constant", None)
    source, pads, mode, value = (pad.args + rest[len(pad.args) :])[:4]
    front = pads[0] == conv.reach and not any(pads[1:])
    return source if front and mode == "constant" and not value else None


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


def _rewrite(gm: fx.GraphModule, nodes: list[fx.Node], conv: _Convolution, x: fx.Node) -> None:
    contexts = contexts_of(gm)[0]
    for node in nodes:
        new = call_before(
            node, causal_convolution, (x, conv.weight, conv.bias, conv.dilation, conv.groups),
            like=conv.node, context=contexts[conv.node],
        )  # fmt: skip
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    if not conv.node.users and conv.node not in nodes:
        gm.graph.erase_node(conv.node)
