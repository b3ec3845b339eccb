"""A chunk of a FLEX value, made from chunks of its operands.

A value that is made again wherever it is used is made for the rows of the current chunk alone, if
its operators let the chunk through. Where one does not, the value is made whole and then sliced.
"""

from __future__ import annotations

from torch import fx

from fxmem.axes.signature import Cut, locate, place
from fxmem.axes.sizes import Size, product, same
from fxmem.streaming.labels import Kind, Labels, call_of, signature_of, tensor_operands


def slices(labels: Labels, node: fx.Node, cut: Cut) -> tuple[Cut | None, ...] | None:
    """Operand cuts of a FLEX node for its slice ``cut``; None where it cannot be sliced so."""
    sig, call = signature_of(node, labels.joint), call_of(node, labels.joint)
    if sig is None or sig.outs[0] is None or not sig.outs[0][cut.dim]:
        return None
    at = locate(sig.outs[0], call.out.shape, cut, sig.extent)
    if at is None or at[0] in sig.whole:
        return None
    out: list[Cut | None] = []
    for info, dims in zip(call.tensors, sig.ins, strict=True):
        c = place(at[0], at[1], dims, sig.extent)
        if c is not None and at[0] in sig.shift:
            c = _unshifted(c, sig.shift[at[0]], info.shape[c.dim])
            if c is None:
                return None
        if c is not None and not same(info.shape[c.dim], product((c.outer, c.length, c.inner))):
            return None
        out.append(c)
    return tuple(out)


def _unshifted(cut: Cut, shift: Size, rows: Size) -> Cut | None:
    """Where the result's rows stand in the operand of a slice, an axis of ``rows`` positions."""
    if (cut.outer, cut.inner) == (1, 1):
        return Cut(cut.dim, rows, product((cut.offset - shift,)))
    return cut if shift == 0 else None


def can_slice(labels: Labels, node: fx.Node, cut: Cut) -> bool:
    """A chunk of the value is made from chunks of its operands; False: from the whole value."""
    if labels.of(node).kind is not Kind.FLEX:
        return True
    cuts = slices(labels, node, cut)
    if cuts is None:
        return False
    operands = tensor_operands(node, labels.joint)
    return all(c is None or can_slice(labels, o, c) for o, c in zip(operands, cuts, strict=True))
