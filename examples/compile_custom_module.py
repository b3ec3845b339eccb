"""Stream a module of your own, with the loss outside it, through ``torch.compile``.

Run: ``python examples/compile_custom_module.py``
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmem import Plan, Stream

WIDTH, HEADS, VOCABULARY, LENGTH = 64, 4, 512, 300


class Block(nn.Module):
    """Causal attention and an MLP, each around the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        up, down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.mlp = nn.Sequential(up, nn.GELU(), down)

    def forward(self, x_BTD: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x_BTD)).unflatten(-1, (3, HEADS, -1))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(self.norms[1](x_BTD))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embed(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Next-token cross-entropy. Inside the compiled function, so the logits stream too."""
    logits_BTV = model(ids_BT)[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())


def main() -> None:
    torch.manual_seed(0)
    plain = Model().double()
    streamed = copy.deepcopy(plain)
    plan = Plan(stream=Stream(chunk=64, loss_chunk=64))
    step = torch.compile(loss_of, backend="fxmem", options={"plan": plan}, fullgraph=True)

    for length in (LENGTH, LENGTH + 57):
        ids_BT = torch.randint(VOCABULARY, (2, length))
        plain.zero_grad(), streamed.zero_grad()
        expected, got = loss_of(plain, ids_BT), step(streamed, ids_BT)
        expected.backward(), got.backward()
        pairs = zip(plain.parameters(), streamed.parameters(), strict=True)
        worst = max(((a.grad - b.grad).norm() / a.grad.norm()).item() for a, b in pairs)
        print(f"T = {length}: loss {got.item():.6f}, largest relative difference {worst:.1e}")
        assert abs(expected.item() - got.item()) < 1e-12
        assert worst < 1e-10


if __name__ == "__main__":
    main()
