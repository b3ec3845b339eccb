"""Rows for ops that look at a window of an axis: convolution, pooling, resizing, Fourier
transforms. The axes they move along are whole; batch and, in a convolution, channels may be cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxmem.axes.signature import (
    ONE,
    AxisRule,
    Call,
    Dim,
    Dims,
    Rule,
    Signature,
    TensorInfo,
    letters,
)
from fxmem.axes.sizes import Size, size
from fxmem.rules.movement import along


def last(count: int) -> Rule:
    """Same axes in and out, of other sizes in the last ``count``, which must be complete."""

    def rule(call: Call) -> Signature:
        dims = letters("d", call.out.rank)
        whole = frozenset(x for (x,) in dims[-count:])
        return Signature((dims,) * len(call.tensors), (dims,) * len(call.outs), whole)

    return rule


def _window(weight: TensorInfo) -> tuple[Dims, Dims]:
    """Dims of positions and of the kernel's entries; a kernel of one entry has no axis."""
    sizes = weight.shape[2:]
    kernel = tuple(ONE if s == 1 else (f"k{i}",) for i, s in enumerate(sizes))
    return letters("l", len(sizes)), kernel


@dataclass(frozen=True)
class _Channels:
    """Dims of the channels of x and of the result, of those of the weight (its first two), what
    must be complete, and the sizes of letters that share a dimension.

    A group reads ``c`` channels of x and makes ``o``; ``g`` counts the groups.
    """

    x: Dim
    out: Dim
    weight: Dims
    whole: frozenset[str]
    extent: dict[str, Size]

    @classmethod
    def of(cls, x: TensorInfo, weight: TensorInfo, groups: int, transposed: bool) -> _Channels:
        if groups == 1:
            rows: Dims = (("o",), ("c",))
            return cls(("c",), ("o",), rows[::-1] if transposed else rows, frozenset(), {})
        made = weight.shape[1] if transposed else weight.shape[0] / groups
        extent = {"g": size(groups), "c": x.shape[1] / groups, "o": made}
        read, out = (("g", name) if extent[name] != 1 else ("g",) for name in ("c", "o"))
        first, second = (read, out) if transposed else (out, read)
        return cls(read, out, (first, second[1:]), frozenset("g"), extent)


def _whole(call: Call, at: int, spatial: Dims, kernel: Dims) -> set[str]:
    """Positions that must be complete; argument ``at`` is the stride, padding follows it."""
    stride, padding = call.args[at : at + 2]
    found = {x for d in kernel for x in d}
    # one number stands for all directions
    steps, margins = (n * len(spatial) if len(n) == 1 else n for n in (stride, padding))
    for axis, entries, step, margin in zip(spatial, kernel, steps, margins, strict=True):
        if entries or step != 1 or margin != 0:  # a result reads other positions than its own
            found.update(axis)
    return found


def convolution(call: Call) -> Signature | None:
    """``x [N, C, *L]``, ``weight [O, C / groups, *K]`` (transposed: ``[C, O / groups, *K]``) and
    bias; without a bias a sum over channels.
    """
    x, weight = call.tensors[:2]
    if x.rank != weight.rank:
        return None
    spatial, kernel = _window(weight)
    channels = _Channels.of(x, weight, call.args[8], call.args[6])
    whole = _whole(call, 3, spatial, kernel) | channels.whole
    bias: tuple[Dims, ...] = ((channels.out,),) * (len(call.tensors) - 2)
    if bias and "c" in (*channels.x, *sum(channels.weight, ())):
        whole.add("c")
    ins = ((("n",), channels.x, *spatial), (*channels.weight, *kernel), *bias)
    return Signature(
        ins, ((("n",), channels.out, *spatial),), frozenset(whole), extent=channels.extent,
        counts=channels.whole,
    )  # fmt: skip


def convolution_backward(call: Call) -> Signature | None:
    """Gradients of x, weight and bias: sums over what each does not have."""
    x, weight = call.tensors[1:3]
    if call.args[7] or x.rank != weight.rank:
        return None
    spatial, kernel = _window(weight)
    channels = _Channels.of(x, weight, call.args[9], transposed=False)
    whole = _whole(call, 4, spatial, kernel) | channels.whole
    if call.outs[2] is not None and "c" in channels.x:
        whole.add("c")  # each part of the channels would add the bias' gradient again
    dx: Dims = (("n",), channels.x, *spatial)
    dweight: Dims = (*channels.weight, *kernel)
    outs = (dx, dweight, (channels.out,))
    return Signature(
        ((("n",), channels.out, *spatial), dx, dweight),
        tuple(None if o is None else d for o, d in zip(call.outs, outs, strict=True)),
        frozenset(whole), extent=channels.extent, counts=channels.whole,
    )  # fmt: skip


ROWS: dict[str, AxisRule] = {
    "aten.convolution.default": AxisRule(convolution, product=(0, 1)),
    "aten.convolution_backward.default": AxisRule(convolution_backward, linear=0),
    "aten.avg_pool2d.default": AxisRule(last(2), linear=0),
    "aten.avg_pool2d_backward.default": AxisRule(last(2), linear=0),
    "aten.max_pool2d_with_indices.default": AxisRule(last(2)),
    "aten.max_pool2d_with_indices_backward.default": AxisRule(last(2), linear=0),
    "aten._adaptive_avg_pool2d.default": AxisRule(last(2), linear=0),
    "aten._adaptive_avg_pool2d_backward.default": AxisRule(last(2), linear=0),
    "aten.upsample_nearest2d.vec": AxisRule(last(2), linear=0),
    "aten.upsample_bilinear2d.vec": AxisRule(last(2), linear=0),
    "aten._fft_r2c.default": AxisRule(along(1), linear=0),
    "aten._fft_c2c.default": AxisRule(along(1), linear=0),
    "aten._fft_c2r.default": AxisRule(along(1), linear=0),
}
