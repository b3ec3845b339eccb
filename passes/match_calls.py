"""Matches of functions that bodies call: attention and weight gradients.

See :mod:`fxmem.passes.match_pointwise`.
"""

from __future__ import annotations

from torch import fx

from fxmem.kernels import attention, calls
from fxmem.kernels.kernel import signature
from fxmem.kernels.registry import find
from fxmem.passes.match_pointwise import Match
from fxmem.program import body_ops as runtime
from fxmem.rewriting.patterns import before, info


def weight_grad(node: fx.Node) -> Match | None:
    """``acc += a @ b``."""
    if node.target is not runtime.add_mm or info(node.args[1]) is None:
        return None

    def replace() -> None:
        before(node, calls.weight_grad, *node.args)
        node.graph.erase_node(node)

    sig = signature("n o, n i -> o i", "o i")
    return Match("weight_grad", "aten.mm.default", sig, info(node.args[1]).dtype, replace)


def attend(node: fx.Node) -> Match | None:
    """Attention of a chunk over spans of keys."""
    if node.target is not attention.forward or info(node.args[0]) is None:
        return None

    def replace() -> None:
        node.target = calls.attention_forward

    sig = find("chunk_attention").signature
    return Match(
        "chunk_attention", "fxmem.attention.default", sig, info(node.args[0]).dtype, replace
    )


def attend_backward(node: fx.Node) -> Match | None:
    """Its backward, which adds into dK and dV."""
    if node.target is not attention.backward or info(node.args[1]) is None:
        return None

    def replace() -> None:
        node.target = calls.attention_backward

    sig = find("chunk_attention_backward").signature
    op = "fxmem.attention_backward.default"
    return Match("chunk_attention_backward", op, sig, info(node.args[1]).dtype, replace)
