"""The letters along which a call can be cut, given how its operands are."""

from __future__ import annotations

from dataclasses import dataclass

from fxmem.axes.signature import Call, Cut, Signature, axis_cuts, locate, place
from fxmem.axes.sizes import Size, T, divide, product, same
from fxmem.streaming.label import STATES, Kind, Label


@dataclass(frozen=True, slots=True)
class Option:
    """Cut the call along ``letter``; ``cuts`` per operand (None: whole)."""

    letter: str
    relative: Cut
    cuts: tuple[Cut | None, ...]
    conflicts: int
    contracts: bool


def options(call: Call, sig: Signature, given: list[Label]) -> list[Option]:
    found: dict[str, Option] = {}
    any_cut = any(g.kind is Kind.CUT for g in given)
    for i, label in enumerate(given):
        shape = call.tensors[i].shape
        cuts: tuple[Cut, ...]
        if any_cut:
            cuts = (label.cut,) if label.cut is not None and label.kind is Kind.CUT else ()
        else:
            cuts = axis_cuts(shape)
        for cut in cuts:
            at = locate(sig.ins[i], shape, cut, sig.extent) if sig.ins[i][cut.dim] else None
            if at is None or at[0] in sig.whole or at[0] in found:
                continue
            option = _option(call, sig, given, *at)
            if option is not None:
                found[at[0]] = option
    return list(found.values())


def _option(
    call: Call, sig: Signature, given: list[Label], letter: str, relative: Cut
) -> Option | None:
    cuts: list[Cut | None] = []
    conflicts = 0
    carried = letter in sig.carried
    if carried and (relative.outer, relative.inner) != (1, 1):
        return None
    for i, label in enumerate(given):
        if carried and i in sig.states:
            cuts.append(STATES)
            continue
        cut = place(letter, relative, sig.ins[i], sig.extent)
        shape = call.tensors[i].shape
        if cut is not None and not same(
            shape[cut.dim], product((cut.outer, cut.length, cut.inner))
        ):
            return None
        cuts.append(cut)
        if label.kind is Kind.CUT and (cut is None or cut != label.cut):
            conflicts += 1
    contracts = not any(d is not None and any(letter in x for x in d) for d in sig.outs)
    return Option(letter, relative, tuple(cuts), conflicts, contracts)


def shifted(cut: Cut, shift: Size, dim: Size) -> Cut | None:
    """The cut after rows moved by ``shift``; None where rows would leave the streamed axis."""
    length = divide(dim, product((cut.outer, cut.inner)))
    if length is None or (cut.outer, cut.inner) != (1, 1):
        return cut if length is not None and same(length, cut.length) and shift == 0 else None
    offset = product((cut.offset + shift,))
    inside = offset.is_nonnegative and product((T - offset - length,)).is_nonnegative
    return Cut(cut.dim, length, offset) if inside else None
