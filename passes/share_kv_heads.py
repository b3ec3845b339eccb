"""Share key/value heads: undo the repetition of K and V before grouped-query attention.

Models repeat each key/value head for its query heads (``expand`` + ``reshape``, or
``repeat_interleave``) because the attention call they use wants equal head counts. The canonical
attention op takes grouped heads, so the repeated tensors, and the sums over them in the backward,
never need to exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from fxmem.frontend.capture import value_of
from fxmem.frontend.origin import name_of
from fxmem.rewriting.pipeline import Edit, LocalPass


@dataclass(frozen=True, slots=True)
class ShareKvHeads(LocalPass[fx.GraphModule]):
    """Rewrite attention calls."""

    name: str = "share_kv_heads"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        for node in gm.graph.nodes:
            if (
                node.op != "call_function"
                or node.target is not torch.nn.functional.scaled_dot_product_attention
            ):
                continue
            if len(node.args) < 3:
                continue
            k, v = (_unrepeated(a) for a in node.args[1:3])
            if k is not None and v is not None and k[1] == v[1]:
                yield partial(_share, node, k[0], v[0])


def _share(node: fx.Node, k: fx.Node, v: fx.Node) -> None:
    node.args = (node.args[0], k, v, *node.args[3:])
    if len(node.args) < 8:
        node.kwargs = {**node.kwargs, "enable_gqa": True}


def _unrepeated(node: object) -> tuple[fx.Node, int] | None:
    """``(base [B, G, S, E], n)`` where ``node [B, G n, S, E]`` repeats every head ``n`` times in a
    row.
    """
    if not isinstance(node, fx.Node):
        return None
    if _is(node, "repeat_interleave") and len(node.args) > 1 and isinstance(node.args[1], int):
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
        base = node.args[0]
        return (base, node.args[1]) if dim in (1, -3) and isinstance(base, fx.Node) else None
    if not _is(node, "reshape", "view", "contiguous"):
        return None
    wide = node.args[0]
    if not isinstance(wide, fx.Node) or not _is(wide, "expand"):
        return None
    inserted = wide.args[0]
    base = inserted.args[0] if isinstance(inserted, fx.Node) and inserted.args else None
    if not isinstance(base, fx.Node) or not _is(inserted, "getitem", "unsqueeze"):
        return None
    shapes = [value_of(x).shape for x in (base, inserted, wide, node)]
    if [len(s) for s in shapes] != [4, 5, 5, 4]:
        return None
    b, i, w, r = shapes
    n = w[2]
    matches = i[2] == 1 and b[1] == i[1] == w[1] and isinstance(n, int) and r[1] == b[1] * n
    return (base, n) if matches else None


def _is(node: object, *names: str) -> bool:
    return isinstance(node, fx.Node) and name_of(node.target) in names
