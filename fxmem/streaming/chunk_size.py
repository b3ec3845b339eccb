"""How many tokens a chunk has, and whether a call is worth streaming at all.

The working set of a chunk grows with its rows; weights, their gradients and the saved states do
not. Automatic chunks are as large as a sixteenth of those fixed bytes allows, between a floor and
the knee beyond which larger chunks only cost memory (:mod:`fxmem.measure.knee`). A call whose
activations are small against the weights runs as it is: streaming it would only cost the
recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sympy import Integer, expand
from torch import Tensor

from fxmem.axes.signature import TensorInfo
from fxmem.axes.sizes import (
    CHUNKS,
    ZERO,
    Size,
    byte_count,
    degree,
    evaluate,
    has_axis,
    per_token,
    product,
)
from fxmem.frontend.capture import canonical_shape
from fxmem.frontend.joint import Joint
from fxmem.measure.knee import knee
from fxmem.plan.plan import Stream
from fxmem.rules import lookup
from fxmem.rules.movement import ROWS as MOVEMENT
from fxmem.streaming.shards import WHOLE, Shards

FLOOR_BYTES = 24 << 20
"""Working set that a chunk may always have."""
FIXED_SHARE = 16
"""A chunk's working set is at most this part of weights, gradients and saved states."""
FLOOR_TOKENS = 128
UPDATE_KNEES = 8 / 3
"""Chunks of the usual size up to which a layer whose backward changes weights is one chunk."""
WHOLE_SHARE = 4
"""A call whose activations are under this part of weights and gradients is not streamed."""


_DEFAULT = (torch.device("cpu"), torch.float32)
LAYER_VALUES = 4.0
LOSS_VALUES = 1.9
"""Room for the working set of a chunk: of a layer by its widest value, of a loss as measured."""
UNSEEN_VALUES = 1.25
"""Values as wide as the vocabulary in a loss that is not known yet, with what lies beside them."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """One region by the sizes of a call.

    Attributes:
        tokens: rows of the state that the region passes on or reads, in all sequences together.
        widest: bytes of its widest value; which of these is the widest depends on the sizes.
        forward: bytes of everything that its forward makes.
    """

    tokens: Size
    widest: tuple[Size, ...]
    forward: Size

    def batch(self, sizes: Mapping[str, int]) -> int:
        """Tokens per row of the streamed axis."""
        return max(1, math.ceil(evaluate(self.tokens, sizes) / length(sizes)))

    def per_token(self, sizes: Mapping[str, int]) -> float:
        """Bytes of the widest value."""
        widest = max((evaluate(w, sizes) for w in self.widest), default=0)
        return widest / max(1, length(sizes) * self.batch(sizes))


def length(sizes: Mapping[str, int]) -> int:
    """Of the streamed axis."""
    return sizes.get("T", 1)


def footprint(joint: Joint) -> Footprint:
    """Measured on the traced graph, views not counted."""
    late = {t for t in joint.tangents if t is not None}
    found: list[Size] = []
    forward: Size = ZERO
    for node in joint.graph.nodes:
        if any(a in late for a in node.all_input_nodes):
            late.add(node)
        if node.op == "placeholder" or not _streams(joint, node) or str(node.target) in MOVEMENT:
            continue
        info = joint.info[node]
        found.append(byte_count(info.shape, info.dtype))
        if node not in late and lookup(node.target) is not None:
            forward = forward + found[-1]
    # of values with the same symbols only the one with the most bytes can be the widest
    largest: dict[Size, Size] = {}
    for size in found:
        factor, symbols = size.as_coeff_Mul()
        largest[symbols] = max(largest.get(symbols, ZERO), factor)
    return Footprint(_tokens(joint), tuple(f * s for s, f in largest.items()), expand(forward))


def _streams(joint: Joint, node: Any) -> bool:
    info = joint.info.get(node)
    return (
        node in joint.learned
        and isinstance(info, TensorInfo)
        and any(has_axis(d) for d in info.shape)
        and CHUNKS not in info.shape  # a state
    )


def _tokens(joint: Joint) -> Size:
    """Rows of the region's state: its sizes up to the streamed axis, and what else differs from
    call to call, multiplied.

    The state is the value at the region's border that has the most elements per token; a bias of
    attention, say, is not one. Where a slice inside streams alone it is the widest value.
    """

    def shapes_of(nodes: Iterable[Any]) -> list[tuple[Size, ...]]:
        found = [joint.info[n].shape for n in nodes if n is not None and _streams(joint, n)]
        return [shape for shape in found if degree(shape) == 1]

    shapes = shapes_of((*joint.outputs, *joint.inputs)) or shapes_of(joint.graph.nodes)
    if not shapes:  # no value has the axis, which this capture may not have at all
        return Integer(1)
    state = max(shapes, key=per_token)
    streamed = next(i for i, d in enumerate(state) if has_axis(d))
    return product(d for i, d in enumerate(state) if i < streamed or d.free_symbols)


@dataclass(frozen=True, slots=True)
class Fixed:
    """What a call holds whatever its chunks: bytes of weights, and of saved states."""

    weights: int
    saved: Size
    device: torch.device
    dtype: torch.dtype


class Chunker:
    """Chunk sizes for one plan; ``chunker(call, sizes)`` is the answer for one region and the sizes
    of a call.

    ``body_bytes(code, kind, sizes, rows)`` measures the working set of the largest loop body.
    """

    def __init__(
        self, stream: Stream, fixed: Fixed, forward: Size, calls: Sequence[Any],
        body_bytes: Callable[[Any, str, Mapping[str, int], int], int],
    ) -> None:  # fmt: skip
        self.stream, self.fixed, self._body_bytes = stream, fixed, body_bytes
        self.forward, self._calls, self.shards = expand(forward), calls, WHOLE

    @classmethod
    def of(
        cls, stream: Stream, weights: Sequence[Tensor], calls: Sequence[Any],
        body_bytes: Callable[[Any, str, Mapping[str, int], int], int],
    ) -> Chunker:  # fmt: skip
        """For the regions of a capture in order."""
        saved: Size = ZERO
        forward: Size = ZERO
        for call in calls:
            for value, leaf in zip(call.code.values, call.leaves, strict=True):
                if leaf[0] == "main":
                    shape = canonical_shape(value, call.code.region.capture.symbols)
                    saved = saved + call.named(byte_count(shape, value.dtype))
            forward = forward + call.named(call.code.footprint.forward)
        distinct = {id(w): w for w in weights}
        count = sum(w.numel() * w.element_size() for w in distinct.values())
        kind = next(((w.device, w.dtype) for w in weights if w.is_floating_point()), _DEFAULT)
        fixed = Fixed(count, expand(saved), *kind)
        return cls(stream, fixed, forward, calls, body_bytes)

    def spread(self, shards: Shards) -> None:
        """Ranks have parts of the parameters: so much less is there whatever the chunks."""
        self.shards = shards
        self.fixed = replace(self.fixed, weights=shards.resident(self.fixed.weights))

    def __call__(
        self, call: Any, sizes: Mapping[str, int], *, updates: bool = False, shrink: int = 1
    ) -> int:
        """``updates``: the region's backward changes weights, which in one chunk it does one
        gradient at a time. ``shrink`` divides an automatic chunk, where a budget asks for it.
        """
        code = call.code
        wanted = self.stream.loss_chunk if code.is_loss else self.stream.chunk
        if wanted != "auto":
            return int(wanted)
        saved = evaluate(self.fixed.saved, sizes)
        sizes = call.sizes(sizes)
        batch = code.footprint.batch(sizes)
        tokens = self._room(saved) / max(1.0, self._working(code, sizes))
        cap = knee(self.fixed.device, self.fixed.dtype)
        whole = min(tokens, UPDATE_KNEES * cap)
        if updates and not code.is_loss and length(sizes) * batch <= whole:
            return length(sizes)
        tokens = min(cap, max(FLOOR_TOKENS, tokens)) / shrink
        if code.is_loss and tokens >= 64:  # its products see the rows of all sequences together
            return max(1, int(tokens // 64) * 64 // batch)
        rows = max(1, int(tokens) // batch)
        return rows - rows % 64 if rows >= FLOOR_TOKENS else 1 << (rows.bit_length() - 1)

    def _room(self, saved: int) -> float:
        """Bytes that a chunk's working set may take; ``saved``: of the states of the call."""
        return max(FLOOR_BYTES, (2 * self.fixed.weights + saved) / FIXED_SHARE)

    def unseen(self, widest: float, sizes: Mapping[str, int]) -> int:
        """Bytes that a chunk takes of a loss that is not known yet, whose widest value has so many
        per token.
        """
        tokens: float = FLOOR_TOKENS
        if self.stream.loss_chunk != "auto":
            tokens = self.stream.loss_chunk
        elif widest:
            room = self._room(evaluate(self.fixed.saved, sizes)) / LOSS_VALUES
            longest = knee(self.fixed.device, self.fixed.dtype)
            tokens = min(longest, max(tokens, room / widest))
        return round(UNSEEN_VALUES * widest * tokens)

    def working(self, call: Any, sizes: Mapping[str, int]) -> float:
        """Bytes that a chunk of the region takes, about."""
        own, code = call.sizes(sizes), call.code
        rows = min(self(call, sizes), length(own))
        return self._working(code, own) * rows * code.footprint.batch(own)

    def whole(self, sizes: Mapping[str, int]) -> bool:
        """The call is small enough to run without streaming."""
        options = self.stream
        if (options.chunk, options.loss_chunk, options.memory) != ("auto", "auto", "least"):
            return False
        return evaluate(self.forward, sizes) * WHOLE_SHARE < 2 * self.fixed.weights

    def tokens(self, sizes: Mapping[str, int]) -> int:
        """Tokens of a call, in all sequences together."""
        every = [(c.code.footprint, c.sizes(sizes)) for c in self._calls]
        return max((f.batch(own) * length(own) for f, own in every), default=length(sizes))

    def _working(self, code: Any, sizes: Mapping[str, int]) -> float:
        """Bytes per token of a chunk's working set, about.

        A loss has as many values as wide as the vocabulary as its formula makes; a layer's widest
        value stands for the others.
        """
        widest = code.footprint.per_token(sizes)
        if not code.is_loss:
            return LAYER_VALUES * widest
        rows = min(length(sizes), FLOOR_TOKENS)
        measured = self._body_bytes(code, "loss", sizes, rows)
        return LOSS_VALUES * max(widest, measured / (rows * code.footprint.batch(sizes)))
