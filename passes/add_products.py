"""Sums of products: ``x += a @ b`` in a chunk body is one product that adds, without a temporary.

Low-rank terms beside weights and the gradients of a value that several matrices read are such sums:
the product is as wide as ``x``, and written and read once more than it needs. Legal where the sum
is in place already (pass ``in_place``), only it reads the product, and nothing that the product
reads is written before the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxmem.program import body_ops as runtime
from fxmem.rewriting.aliases import memory_read, sources, written_between
from fxmem.rewriting.patterns import RESHAPES, is_op
from fxmem.rewriting.pipeline import Edit, LocalPass

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class AddProducts(LocalPass[fx.Graph]):
    """Rewrite the graph of a chunk body where it is legal."""

    name: str = "add_products"

    def edits(self, graph: fx.Graph) -> Iterator[Edit]:
        for node in list(graph.nodes):
            if node.target is aten.add_.Tensor and len(node.args) == 2 and not node.kwargs:
                yield from _fused(node)


def adds_product(node: fx.Node, position: int) -> bool:
    """Whether ``node`` adds a product that nobody else reads to its operand at ``position``."""
    if str(node.target) not in ("aten.add.Tensor", "aten.add_.Tensor") or len(node.args) != 2:
        return False
    info = node.meta.get("info")
    if info is None or info.dtype.itemsize < 4:
        return False  # Inductor keeps such a sum in float32; the product would round it
    return _product(node.args[1 - position]) is not None and not node.kwargs


def _product(value: object) -> tuple[fx.Node, list[fx.Node]] | None:
    """The matrix product behind ``value``, and the views between, if each has one reader."""
    chain = []
    while isinstance(value, fx.Node) and is_op(value, *RESHAPES) and len(value.users) == 1:
        chain.append(value)
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.target is not aten.mm.default:
        return None
    return (value, chain) if len(value.users) == 1 else None


def _fused(node: fx.Node) -> Iterator[Edit]:
    x, found = node.args[0], _product(node.args[1])
    if found is None or not isinstance(x, fx.Node):
        return
    value, chain = found
    a, b = value.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    read = memory_read((a, b))
    if not sources(x).isdisjoint(read) or value in sources(x):
        return
    if not read.isdisjoint(written_between(value, node)):
        return

    def edit() -> None:
        with node.graph.inserting_before(node):
            fused = node.graph.call_function(runtime.plus_mm, (x, a, b))
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        for gone in (node, *chain, value):
            node.graph.erase_node(gone)

    yield edit
