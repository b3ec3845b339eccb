"""How many tokens a chunk has, and whether a call is worth streaming at all.

The working set of a chunk grows with its rows; weights, their gradients and the saved states do
not. Automatic chunks are as large as a sixteenth of those fixed bytes allows, between a floor under
which matrix products starve and a cap beyond which larger chunks only cost memory. A call whose
activations are small against the weights runs as it is: streaming it would only cost the
recomputation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxmem.axes import TensorInfo
from fxmem.joint import Joint
from fxmem.plan import Stream
from fxmem.rules import lookup
from fxmem.rules.movement import ROWS as MOVEMENT
from fxmem.sizes import has_axis, per_token

FLOOR_BYTES = 24 << 20
"""Working set that a chunk may always have."""
FIXED_SHARE = 16
"""A chunk's working set is at most this part of weights, gradients and saved states."""
FLOOR_TOKENS = 128
CAP_TOKENS = {"cpu": 384}
CAP_TOKENS_DEVICE = 2048
UPDATE_TOKENS = {"cpu": 1024}
UPDATE_TOKENS_DEVICE = 4096
"""Up to which a layer whose backward changes weights is one chunk."""
WHOLE_SHARE = 4
"""A call whose activations are under this part of weights and gradients is not streamed."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes per token of one region: its widest value, and everything its forward makes."""

    widest: float
    forward: float


def footprint(joint: Joint) -> Footprint:
    """Measured on the traced graph, views not counted."""
    late = {t for t in joint.tangents if t is not None}
    widest = total = 0.0
    for node in joint.graph.nodes:
        info = joint.info.get(node)
        if any(a in late for a in node.all_input_nodes):
            late.add(node)
        if (
            node not in joint.learned
            or not isinstance(info, TensorInfo)
            or node.op == "placeholder"
        ):
            continue
        if not any(has_axis(d) for d in info.shape) or str(node.target) in MOVEMENT:
            continue
        size = per_token(info.shape) * info.dtype.itemsize
        widest = max(widest, size)
        if node not in late and lookup(node.target) is not None:
            total += size
    return Footprint(widest, total)


@dataclass(frozen=True, slots=True)
class Fixed:
    """What a call holds whatever its chunks: bytes of weights, and of saved states per token."""

    weights: int
    saved_per_token: float
    device: str


class Chunker:
    """Chunk sizes for one plan; ``rows(code, sizes)`` is the answer for one region and call."""

    def __init__(self, stream: Stream, fixed: Fixed, footprints: Sequence[Footprint]) -> None:
        self.stream, self.fixed = stream, fixed
        self.footprints = footprints

    def __call__(self, code: Any, sizes: Mapping[str, int], *, updates: bool = False) -> int:
        """``updates``: the region's backward changes weights, which in one chunk it does one
        gradient at a time.
        """
        wanted = self.stream.loss_chunk if code.is_loss else self.stream.chunk
        if wanted != "auto":
            return int(wanted)
        batch = _batch(sizes)
        saved = self.fixed.saved_per_token * batch * sizes.get("T", 1)
        budget = max(FLOOR_BYTES, (2 * self.fixed.weights + saved) / FIXED_SHARE)
        tokens = budget / max(1.0, _working(code))
        cap = CAP_TOKENS.get(self.fixed.device, CAP_TOKENS_DEVICE)
        length = sizes.get("T", 1)
        whole = UPDATE_TOKENS.get(self.fixed.device, UPDATE_TOKENS_DEVICE)
        if updates and not code.is_loss and length * batch <= min(tokens, whole):
            return length
        tokens = min(cap, max(FLOOR_TOKENS, tokens))
        rows = max(1, int(tokens) // batch)
        return rows - rows % 64 if rows >= FLOOR_TOKENS else 1 << (rows.bit_length() - 1)

    def working(self, code: Any, sizes: Mapping[str, int]) -> float:
        """Bytes that a chunk of the region takes, about."""
        rows = min(self(code, sizes), sizes.get("T", 1))
        return _working(code) * rows * _batch(sizes)

    def whole(self, sizes: Mapping[str, int]) -> bool:
        """The call is small enough to run without streaming."""
        if self.stream.chunk != "auto" or self.stream.loss_chunk != "auto":
            return False
        tokens = _batch(sizes) * sizes.get("T", 1)
        activations = tokens * sum(f.forward for f in self.footprints)
        return activations * WHOLE_SHARE < 2 * self.fixed.weights


def _working(code: Any) -> float:
    """Bytes per token of a chunk's working set: the widest values alive at the same time."""
    return (2.0 if code.is_loss else 4.0) * float(code.footprint.widest)


def _batch(sizes: Mapping[str, int]) -> int:
    """All symbolic sizes but the streamed one: the batch, usually."""
    out = 1
    for name, value in sizes.items():
        if name != "T":
            out *= max(1, value)
    return out


def fixed_bytes(parameters: Sequence[Tensor], saved_per_token: float) -> Fixed:
    distinct = {id(p): p for p in parameters}
    weights = sum(p.numel() * p.element_size() for p in distinct.values())
    device = next((p.device.type for p in parameters), "cpu")
    return Fixed(weights, saved_per_token, device)
