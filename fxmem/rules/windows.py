"""Rows for ops that look at a window of an axis: convolution, pooling, resizing, Fourier
transforms. The axes they move along are whole; batch and, in a convolution, channels may be cut.
"""

from __future__ import annotations

from fxmem.axes.signature import ONE, AxisRule, Call, Dims, Rule, Signature, TensorInfo, letters
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


def _whole(call: Call, at: int, spatial: Dims, kernel: Dims) -> set[str]:
    """What must be complete; argument ``at`` is the stride, padding and groups follow it."""
    stride, padding, _, _, _, groups = call.args[at : at + 6]
    found = {x for d in kernel for x in d} | ({"c", "o"} if groups != 1 else set())
    # one number stands for all directions
    steps, margins = (n * len(spatial) if len(n) == 1 else n for n in (stride, padding))
    for axis, entries, step, margin in zip(spatial, kernel, steps, margins, strict=True):
        if entries or step != 1 or margin != 0:  # a result reads other positions than its own
            found.update(axis)
    return found


def convolution(call: Call) -> Signature | None:
    """``x [N, C, *L]``, ``weight [O, C, *K]`` and bias; without a bias a sum over channels."""
    x, weight = call.tensors[:2]
    if call.args[6] or x.rank != weight.rank:
        return None
    spatial, kernel = _window(weight)
    whole = _whole(call, 3, spatial, kernel)
    bias: tuple[Dims, ...] = ((("o",),),) * (len(call.tensors) - 2)
    if bias:
        whole.add("c")
    ins = ((("n",), ("c",), *spatial), (("o",), ("c",), *kernel), *bias)
    return Signature(ins, ((("n",), ("o",), *spatial),), frozenset(whole))


def convolution_backward(call: Call) -> Signature | None:
    """Gradients of x, weight and bias: sums over what each does not have."""
    x, weight = call.tensors[1:3]
    if call.args[7] or x.rank != weight.rank:
        return None
    spatial, kernel = _window(weight)
    whole = _whole(call, 4, spatial, kernel)
    if call.outs[2] is not None:
        whole.add("c")  # each part of the channels would add the bias' gradient again
    dx: Dims = (("n",), ("c",), *spatial)
    dweight: Dims = (("o",), ("c",), *kernel)
    outs = (dx, dweight, (("o",),))
    return Signature(
        ((("n",), ("o",), *spatial), dx, dweight),
        tuple(None if o is None else d for o, d in zip(call.outs, outs, strict=True)),
        frozenset(whole),
    )


ROWS: dict[str, AxisRule] = {
    "aten.convolution.default": AxisRule(convolution),
    "aten.convolution_backward.default": AxisRule(convolution_backward, linear=0),
    "aten.avg_pool2d.default": AxisRule(last(2), linear=0),
    "aten.avg_pool2d_backward.default": AxisRule(last(2), linear=0),
    "aten.max_pool2d_with_indices.default": AxisRule(last(2)),
    "aten.max_pool2d_with_indices_backward.default": AxisRule(last(2), linear=0),
    "aten._adaptive_avg_pool2d.default": AxisRule(last(2), linear=0),
    "aten._adaptive_avg_pool2d_backward.default": AxisRule(last(2), linear=0),
    "aten._fft_r2c.default": AxisRule(along(1), linear=0),
    "aten._fft_c2c.default": AxisRule(along(1), linear=0),
    "aten._fft_c2r.default": AxisRule(along(1), linear=0),
}
