"""Oracle 3: every row of the table against the op itself.

A sample call is cut along each letter of its signature into ragged chunks, the pieces run on their
own and are merged by role: concatenated where an output has the letter, added where it does not.
The result must be that of the whole call. A letter that the row calls ``whole`` must fail this,
else the row is too strict.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table_samples import BY_HAND, IDS, MISSING, SAMPLES, STATES_OF, Sample, map_tensors
from torch import Tensor

from fxmem import VerificationError
from fxmem.axes.signature import Cut, Dims, Signature, TensorInfo, place
from fxmem.axes.sizes import Size, size
from fxmem.streaming.carried_forms import step_of

# Rows that are stricter than the sum of naive pieces needs. Key: op, letter.
STRICT = {
    ("aten.any.dim", "d1"): "adding booleans is a logical or, which happens to merge any()",
    ("aten.any.dims", "d1"): "as any.dim",
    ("aten.any.default", "d0"): "as any.dim",
    ("aten.any.default", "d1"): "as any.dim",
    (
        "fxmem.attention_backward.default",
        "k",
    ): "given the logsumexp of all keys, runs of keys add up",
}

VIEWS = {
    "aten.view.default", "aten._unsafe_view.default", "aten.squeeze.default", "aten.squeeze.dim",
    "aten.squeeze.dims",
}  # fmt: skip


class Uncuttable(Exception):
    """The pieces do not fit together, so the naive cut cannot even be made."""


def lengths(sig: Signature, infos: list[tuple[Dims, TensorInfo]]) -> dict[str, int]:
    """Size of every letter, from the first dimension that it has to itself."""
    found = {letter: int(extent) for letter, extent in sig.extent.items()}
    for dims, t in infos:
        for dim, extent in zip(dims, t.shape, strict=True):
            if len(dim) == 1:
                found.setdefault(dim[0], int(extent))
    return found


def chunks(length: int) -> list[tuple[int, int]]:
    """Ragged: one row, then the rest in two uneven parts where there are enough rows."""
    edges = sorted({0, 1, 1 + max(1, (length - 1) * 2 // 3), length})
    edges = [e for e in edges if e <= length]
    return list(zip(edges, edges[1:], strict=False))


def cut_of(letter: str, length: int, dims: Dims, t: TensorInfo, sig: Signature) -> Cut | None:
    cut = place(letter, Cut(-1, size(length)), dims, sig.extent)
    if cut is not None and t.shape[cut.dim] != cut.outer * cut.length * cut.inner:
        raise Uncuttable(f"{letter} has {t.shape[cut.dim]} and {length} rows")
    return cut


def split(x: Tensor, cut: Cut) -> Tensor:
    """``x`` with the cut dimension as three: outer, rows, inner."""
    at, outer, inner = cut.dim, int(cut.outer), int(cut.inner)
    return x.reshape(*x.shape[:at], outer, -1, inner, *x.shape[at + 1 :])


def take(x: Tensor, cut: Cut, lo: int, hi: int) -> Tensor:
    """Rows as a loop takes them, with the strides of the whole."""
    rows = split(x, cut).narrow(cut.dim + 1, lo, hi - lo)
    return rows.flatten(cut.dim, cut.dim + 2)


def join(parts: list[Tensor], cut: Cut) -> Tensor:
    return torch.cat([split(p, cut) for p in parts], cut.dim + 1).flatten(cut.dim, cut.dim + 2)


def piece_args(sample: Sample, cuts: list[Cut | None], lo: int, hi: int) -> tuple[Any, ...]:
    pending = enumerate(cuts)

    def piece(x: Tensor) -> Tensor:
        at, cut = next(pending)
        part = x.clone() if cut is None else take(x, cut, lo, hi)
        return part.contiguous() if at in sample.row.dense else part

    return map_tensors(sample.args, piece)


def tensors_of(sample: Sample) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(sample.args, found.append)
    return found


def hand_on(sample: Sample, letter: str) -> tuple[list[Tensor], list[Tensor]]:
    """The call in pieces along a carried letter, merged, and the state that each began with."""
    call, sig = sample.call, sample.signature
    known = [*zip(sig.ins, call.tensors, strict=True), *zip(sig.outs, call.outs, strict=True)]
    length = lengths(sig, known)[letter]  # type: ignore[arg-type]
    parts, step = chunks(length), step_of(sample.target)
    start = sample.run()[-1] if sig.initial is None else tensors_of(sample)[sig.initial]
    states = [start]
    earlier = []
    if sig.states:
        earlier = hand_on(STATES_OF[sample.op](*sample.args), letter)[1]
    cuts = [
        None if i in sig.states else cut_of(letter, length, d, t, sig)
        for i, (d, t) in enumerate(zip(sig.ins, call.tensors, strict=True))
    ]
    order = range(len(parts))[:: sig.carried[letter]]
    pieces: dict[int, tuple[Tensor, ...]] = {}
    for i in order:
        count = iter(range(len(cuts)))
        args = map_tensors(
            piece_args(sample, cuts, *parts[i]),
            lambda x, i=i, count=count: earlier[i] if next(count) in sig.states else x,
        )
        *pieces[i], after = step(states[-1], *args)
        states.append(after)
    kept = [n for n in range(len(sig.outs) - 1) if n != sig.final]
    out_cuts = [cut_of(letter, length, sig.outs[n], call.outs[n], sig) for n in kept]  # type: ignore[arg-type]
    merged = [
        sum(p[1:], p[0]) if cut is None else join(p, cut)
        for cut, p in zip(out_cuts, zip(*map(pieces.get, sorted(pieces)), strict=True), strict=True)
    ]
    if sig.final is not None:
        merged.insert(sig.final, states[-1])
    began = dict(zip(order, states, strict=False))
    return [*merged, states[0]], [began[i] for i in sorted(began)]


def run_pieces(sample: Sample, letter: str) -> list[Tensor]:
    """The call in pieces along ``letter``, merged."""
    if letter in sample.signature.carried:
        return hand_on(sample, letter)[0]
    call, sig = sample.call, sample.signature
    outs = [(d, o) for d, o in zip(sig.outs, call.outs, strict=True) if d is not None and o]
    known = [*zip(sig.ins, call.tensors, strict=True), *outs]
    length = lengths(sig, known)[letter]
    cuts = [cut_of(letter, length, d, t, sig) for d, t in zip(sig.ins, call.tensors, strict=True)]
    out_cuts = [cut_of(letter, length, d, o, sig) for d, o in outs]
    pieces: list[list[Tensor]] = []
    for lo, hi in chunks(length):
        args = piece_args(sample, cuts, lo, hi)
        target = BY_HAND.get(sample.op, sample.target)
        if sample.row.sizes is not None:
            shape: tuple[Size, ...] = outs[0][1].shape
            if out_cuts[0] is not None:
                shape = out_cuts[0].shape(shape, size(hi - lo))
            at = sample.row.sizes
            args = (*args[:at], [int(s) for s in shape], *args[at + 1 :])
            target = torch.ops.aten.reshape.default if sample.op in VIEWS else target
        if sample.row.place is not None and (cut := out_cuts[0]) is not None:
            where = [cut.dim, int(cut.outer), int(cut.inner), lo, length]
            args = (*args[: sample.row.place], where, *args[sample.row.place + 1 :])
        result = target(*args, **sample.kwargs)
        result = result if isinstance(result, (tuple, list)) else (result,)
        pieces.append([r for r in result if r is not None])
    if any(len(p) != len(outs) for p in pieces):
        raise Uncuttable("pieces differ in number of outputs")
    merged = []
    for index, cut in enumerate(out_cuts):
        parts = [p[index] for p in pieces]
        merged.append(sum(parts[1:], parts[0]) if cut is None else join(parts, cut))
    return merged


def agrees(sample: Sample, letter: str) -> bool:
    whole = [o for o in sample.run() if o is not None]
    for got, want in zip(run_pieces(sample, letter), whole, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            return False
        wide = torch.complex128 if want.is_complex() else torch.float64
        if not torch.allclose(got.to(wide), want.to(wide), rtol=1e-12, atol=1e-12):
            return False
    return True


def letters_of(sig: Signature) -> list[str]:
    dims = [d for t in (*sig.ins, *(o for o in sig.outs if o is not None)) for d in t]
    return list(dict.fromkeys(x for d in dims for x in d))


def made_only(sig: Signature, letter: str) -> bool:
    """No operand has the letter."""
    return not any(letter in d for dims in sig.ins for d in dims)


def test_every_row_has_a_sample() -> None:
    assert set() == MISSING


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_cut_along_every_free_letter(sample: Sample) -> None:
    sig = sample.signature
    for letter in letters_of(sig):
        if letter in sig.whole or letter in sig.shift:
            continue
        # A letter that the op makes is cut only in cheap rows, where a slice of the result is asked
        # for.
        if made_only(sig, letter) and not sample.row.cheap:
            continue
        assert agrees(sample, letter), f"{sample.op} cut along {letter}"


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.signature.shift], ids=lambda s: s.op)
def test_shifted_letter_moves_rows(sample: Sample) -> None:
    """Row ``r`` of the output is row ``r + shift`` of the input, zero where that does not exist."""
    (letter,), sig = tuple(sample.signature.shift), sample.signature
    (out,), (source,) = sample.run(), [a for a in sample.args if isinstance(a, Tensor)]
    dim = sig.ins[0].index((letter,))
    shift = int(sig.shift[letter])
    for r in range(out.shape[dim]):  # type: ignore[union-attr]
        row = out.select(dim, r)  # type: ignore[union-attr]
        at = r + shift
        want = source.select(dim, at) if 0 <= at < source.shape[dim] else torch.zeros_like(row)
        assert torch.equal(row, want)


WHOLE = sorted({(s.op, x) for s in SAMPLES for x in s.signature.whole})


@pytest.mark.parametrize(("op", "letter"), WHOLE, ids=[f"{o}-{x}" for o, x in WHOLE])
def test_whole_letter_cannot_be_cut(op: str, letter: str) -> None:
    outcomes = []
    for sample in SAMPLES:
        if sample.op != op or letter not in sample.signature.whole:
            continue
        try:
            outcomes.append(agrees(sample, letter))
        except (Uncuttable, RuntimeError, IndexError, VerificationError):
            outcomes.append(False)
    assert all(outcomes) == ((op, letter) in STRICT), f"{op}: {letter} need not be whole"


LINEAR = [n for n, s in enumerate(SAMPLES) if s.row.linear is not None]


@pytest.mark.parametrize("index", LINEAR, ids=[IDS[n] for n in LINEAR])
def test_linear_rows_map_zero_to_zero(index: int) -> None:
    sample = SAMPLES[index]
    count = 0

    def cleared(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.zeros_like(x) if count - 1 == sample.row.linear else x

    for out in sample.run(map_tensors(sample.args, cleared)):
        assert out is None or not out.any()


PRODUCTS = [n for n, s in enumerate(SAMPLES) if s.row.product is not None]


@pytest.mark.parametrize("index", PRODUCTS, ids=[IDS[n] for n in PRODUCTS])
def test_products_are_affine_in_each_operand(index: int) -> None:
    sample = SAMPLES[index]

    def scaled(at: int, factor: float) -> Tensor:
        number = iter(range(len(sample.call.tensors)))
        args = map_tensors(sample.args, lambda x: x * factor if next(number) == at else x)
        (out,) = sample.run(args)
        assert out is not None
        return out

    assert sample.row.product is not None
    for at in sample.row.product:
        none, one, three = (scaled(at, factor) for factor in (0.0, 1.0, 3.0))
        assert torch.allclose(three - none, 3 * (one - none), rtol=1e-12, atol=1e-12)
        assert not torch.equal(one, none)
