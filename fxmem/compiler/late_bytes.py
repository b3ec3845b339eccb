"""Bytes of what is done with outputs that leave a call as a promise, between its forward and its
backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxmem.axes.sizes import degree, evaluate_shape, per_token
from fxmem.frontend.capture import Capture, canonical_shape
from fxmem.frontend.late_outputs import Late
from fxmem.frontend.parameter_free import Leaf
from fxmem.streaming.chunk_size import Chunker


@dataclass(frozen=True, slots=True)
class LateBytes:
    """Of one call.

    Attributes:
        states: gradients of what the regions that are run later read of the call.
        weights: gradients of the parameters that they read.
        working: what else is alive while they run.
    """

    states: Mapping[Leaf, int]
    weights: Mapping[Leaf, int]
    working: int


def late_bytes(
    capture: Capture, late: Sequence[Late], chunker: Chunker, sizes: Mapping[str, int], known: int
) -> LateBytes:
    """``known``: the working set of what has been done with them; 0 before anything has."""

    def size(value: Tensor) -> int:
        count = value.dtype.itemsize
        for d in evaluate_shape(canonical_shape(value, capture.symbols), sizes):
            count *= d
        return count

    learning = {
        leaf: (size(value), is_weight)
        for region in (o.region for o in late)
        for leaf, value, needed, is_weight in zip(
            region.leaves, region.values, region.needs_grad, region.parameter_mask, strict=True
        )
        if needed
    }
    widest = 0.0
    for o in late:
        shape = canonical_shape(o.value, capture.symbols)
        if degree(shape):
            widest = max(widest, per_token(shape) * max(4, o.value.dtype.itemsize))
    return LateBytes(
        {leaf: n for leaf, (n, is_weight) in learning.items() if not is_weight},
        {leaf: n for leaf, (n, is_weight) in learning.items() if is_weight},
        known or chunker.unseen(widest, sizes),
    )


__all__ = ["LateBytes", "late_bytes"]
