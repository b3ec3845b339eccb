"""Layers ``[batch, length, width] -> same`` whose inner units can, or cannot, be removed exactly.

`LAYERS`: name -> (layer, how many inner units may be removed, or why none). Each is a way in which
a coupling could be wrong without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER = 6, 8
Make = Callable[[Any, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """``x + body(self, x, up(x))``."""

    def __init__(self, body: Make, reads: int = INNER, **parts: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(reads, WIDTH)
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part[0], persistent=part[1])
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self, x, F.silu(self.up(x)))


class OfSigmoid(nn.Module):
    """A product with something else than the module's input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, INNER))

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() @ self.weight.T


class Tied(nn.Module):
    """One weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INNER, WIDTH), nn.Linear(INNER, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x.tanh())


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def depthwise(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.down(m.conv(h.transpose(1, 2)).transpose(1, 2))


def halves(m: Any, x: Tensor, h: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    return m.down(a * b.cos())


def joined(m: Any, x: Tensor, h: Tensor) -> Tensor:
    """A join of two values, as one factor of a flattened axis."""
    both = torch.cat([h, m.other(x)], -1)
    wide = (both[..., None] * m.scale).flatten(2)
    return m.down(wide)


def interleaved(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.down(h.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(2))


def attention(m: Any, x: Tensor, h: Tensor) -> Tensor:
    q, k = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (m.q(x), h))
    return m.down(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2))


def same_keys_and_values(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.down(F.scaled_dot_product_attention(h, h, h))


LAYERS: dict[str, tuple[Callable[[], Layer], list[int] | str]] = {
    "plain": (lambda: Layer(lambda m, x, h: m.down(h)), [INNER]),
    "function": (lambda: Layer(lambda m, x, h: F.linear(h, m.down.weight)), [INNER]),
    "matrix": (lambda: Layer(lambda m, x, h: (m.down.weight @ h.mT).mT), [INNER]),
    "own activation": (lambda: Layer(lambda m, x, h: m.out(h), out=OfSigmoid()), [INNER]),
    "two homes": (lambda: Layer(lambda m, x, h: m.out(h), out=Tied()), [INNER]),
    "scaled weight": (lambda: Layer(lambda m, x, h: h @ (m.down.weight * 2).T), [INNER]),
    "and back": (
        lambda: Layer(lambda m, x, h: F.linear(h, m.up.weight.T) + m.down(h)), [INNER],
    ),
    "halves": (lambda: Layer(halves, INNER // 2), [INNER // 2]),
    "depthwise": (
        lambda: Layer(depthwise, conv=nn.Conv1d(INNER, INNER, 3, padding=1, groups=INNER)),
        [INNER],
    ),
    "in groups": (
        lambda: Layer(depthwise, conv=nn.Conv1d(INNER, INNER, 3, padding=1, groups=4)), [4],
    ),
    "statistics": (
        lambda: Layer(depthwise, conv=nn.BatchNorm1d(INNER)), [INNER],
    ),
    "saved buffer": (
        lambda: Layer(lambda m, x, h: m.down(h * m.b), b=(torch.randn(INNER), True)), [INNER],
    ),
    "joined": (
        lambda: Layer(joined, 2 * (INNER + 4), other=nn.Linear(WIDTH, 4), scale=parameter(2)),
        [INNER, 4],
    ),
    "interleaved": (lambda: Layer(interleaved), "inside a head"),
    "heads": (lambda: Layer(attention, q=nn.Linear(WIDTH, INNER)), [2]),
    "one head": (lambda: Layer(same_keys_and_values), "multiplies two values"),
    "made buffer": (
        lambda: Layer(lambda m, x, h: m.down(h * m.b), b=(torch.randn(INNER), False)), "buffer .*b",
    ),
    "exp of the weight": (lambda: Layer(lambda m, x, h: h @ m.down.weight.exp().T), "two values"),
    "sum": (lambda: Layer(lambda m, x, h: m.down(h) + h.sum(-1, True)), "sum.* reads all of it"),
    "largest": (lambda: Layer(lambda m, x, h: m.down(h) + h.amax(-1, True)), "amax"),
    "gram": (lambda: Layer(lambda m, x, h: m.down(h) + h @ h.mT @ x), "multiplies two values"),
    "rolled": (lambda: Layer(lambda m, x, h: m.down(h.roll(1, -1))), "index|roll"),
    "running": (lambda: Layer(lambda m, x, h: m.down(h.cumsum(-1))), "cumsum"),
    "softmax": (lambda: Layer(lambda m, x, h: m.down(h.softmax(-1))), "softmax"),
    "distance": (
        lambda: Layer(lambda m, x, h: m.down(h) + torch.cdist(h, m.p), p=parameter(WIDTH, INNER)),
        "cdist",
    ),
    "picked": (lambda: Layer(lambda m, x, h: m.down(h[..., [0, 2, 3]]), 3), "index"),
    "padded": (lambda: Layer(lambda m, x, h: m.down(F.pad(h, (0, 2))), INNER + 2), "pad"),
    "mixed": (lambda: Layer(lambda m, x, h: m.down(h.unflatten(-1, (2, 4)).sum(-2)), 4), "sum"),
}  # fmt: skip


class Stack(nn.Module):
    """Layers one after the other, in float64, in evaluation mode."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name][0]() for name in names)
        self.head = nn.LayerNorm(WIDTH)  # so that the stream itself is fixed
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(self.head(x))
        return x
