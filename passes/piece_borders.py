"""The results of pieces that run as they are, :mod:`fxmem.frontend.opaque`, pass from region to
region one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxmem._compat import capture_stack
from fxmem.errors import CaptureError
from fxmem.frontend.origin import module_path, source_line
from fxmem.rewriting.pipeline import Required, copy_graph


@dataclass(frozen=True, slots=True)
class PieceBorders(Required):
    """Take what a piece gives apart where it is made."""

    name: str = "piece_borders"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if not any(map(capture_stack.is_piece, gm.graph.nodes)):
            return gm
        gm = copy_graph(gm)
        for node in [n for n in gm.graph.nodes if capture_stack.is_piece(n)]:
            take_apart(node)
        gm.graph.lint()
        gm.recompile()
        return gm


def take_apart(node: fx.Node) -> None:
    """Elements of a tuple are taken where it is made: no tuple passes from region to region."""
    at = node
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            at.append(user)
            at = user


def check_outside(nodes: Iterable[fx.Node]) -> None:
    """
    Raises:
        CaptureError: one of these nodes, which lie inside another function, calls a piece.
    """
    for node in filter(capture_stack.is_piece, nodes):
        raise CaptureError(
            "a part that runs as it is, under vmap or a function with a backward of its own",
            module=module_path(node), source=source_line(node),
        )  # fmt: skip
