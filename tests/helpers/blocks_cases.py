"""A small language model, plain references and runs shared by the tests of block training.

Nothing here needs transformers, so processes that the tests start are quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem
from fxmem import BlockAdamW, Blocks, Plan, Stream
from fxmem.blocks.attach import state_of
from fxmem.blocks.state import BlockState

VOCAB, WIDTH, LENGTH = 13, 8, 12
STREAM = Stream(chunk=5, loss_chunk=4)


class Layer(nn.Module):
    """A residual MLP with a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Small(nn.Module):
    """Embedding, layers, final norm, head; ``forward(ids)`` is the mean loss of the next token."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def small(layers: int = 3, dtype: torch.dtype = torch.float64) -> Small:
    """Random weights, the same ones at every call."""
    torch.manual_seed(0)
    net = Small(layers).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def make(
    layers: int = 3, lr: float = 0.01, stream: Stream | None = STREAM,
    dtype: torch.dtype = torch.float64, optimizer: Any = None, **options: Any,
) -> tuple[Small, BlockAdamW, BlockState]:  # fmt: skip
    """The small model with block training; visits of two steps unless ``options`` say otherwise."""
    net = small(layers, dtype)
    fxmem.transform(net, Plan(stream=stream, blocks=Blocks(**{"steps": 2, **options})))
    return net, BlockAdamW(net, lr=lr, **(optimizer or {})), state_of(net)


def ids(seed: int, rows: int = 2, length: int = LENGTH) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=gen)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def gradients(net: nn.Module, values: dict[str, Tensor], *losses: tuple[float, Any]
              ) -> dict[str, Tensor]:  # fmt: skip
    """Plain autograd at other weights: the sum of factors times losses of inputs."""
    net.load_state_dict(values)
    net.zero_grad()
    sum(c * net(x) for c, x in losses).backward()  # type: ignore[union-attr]
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def train(
    net: nn.Module, opt: BlockAdamW, steps: Iterable[int], schedule: Any = None,
    after: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """One backward per step."""
    for step in steps:
        net(ids(step)).backward()
        opt.step()
        if schedule is not None:
            schedule.step()
        net.zero_grad()
        if after is not None:
            after()


class Adam:
    """AdamW by its formula (Loshchilov and Hutter 2019), one state per name."""

    def __init__(self) -> None:
        self.state: dict[str, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, name: str, p: Tensor, g: Tensor, lr: float, decay: float = 0.0) -> Tensor:
        t, m, v = self.state.get(name, (0, torch.zeros_like(g), torch.zeros_like(g)))
        t, m, v = t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        self.state[name] = t, m, v
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        return (1 - lr * decay) * p - lr * step


def position(name: str) -> int:
    """-1 before the layers, the layer's number, and 1000 after them."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if number is not None:
        return number
    return -1 if "embed" in name else 1000
