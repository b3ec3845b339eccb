"""A rival's technique, re-implemented: an MLP that runs tile by tile over the tokens.

The forward keeps only its input. The backward re-runs one tile at a time and back-propagates it at
once, so that only one tile's wide activations are alive. Described in Arctic Long Sequence
Training, arXiv 2506.13996, section 3.1.1.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Forward = Callable[[torch.Tensor], torch.Tensor]


class TiledTokens(torch.autograd.Function):
    """``forward(x)`` of a function that acts on every token by itself, in tiles."""

    @staticmethod
    def forward(ctx: Any, run: Forward, tiles: int, x_BTD: torch.Tensor) -> torch.Tensor:
        """Keep ``x`` alone; parameters reach the backward through ``run``."""
        ctx.run, ctx.tiles = run, tiles
        ctx.save_for_backward(x_BTD)
        return torch.cat([run(tile) for tile in x_BTD.chunk(tiles, dim=1)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        """Parameter gradients accumulate in ``.grad`` tile by tile, as in the original."""
        (x_BTD,) = ctx.saved_tensors
        parts = []
        pairs = zip(x_BTD.chunk(ctx.tiles, dim=1), grads[0].chunk(ctx.tiles, dim=1), strict=True)
        for tile, grad in pairs:
            tile = tile.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.run(tile)
            torch.autograd.backward(out, grad)
            parts.append(tile.grad)
        return None, None, torch.cat(parts, dim=1)


def tile_mlps(model: nn.Module, tiles: int) -> int:
    """Patch every MLP of the model in place; returns how many there were."""
    found = list(find_mlps(model))
    for mlp in found:
        whole = type(mlp).forward

        def tiled(self: nn.Module, x: torch.Tensor, whole: Any = whole) -> torch.Tensor:
            run = types.MethodType(whole, self)
            out: torch.Tensor = TiledTokens.apply(run, tiles, x)
            return out

        mlp.forward = types.MethodType(tiled, mlp)
    return len(found)


def find_mlps(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose linear children widen d to f and bring f back to d exactly once."""
    for module in model.modules():
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        shapes = [(linear.in_features, linear.out_features) for linear in linears]
        down = [(f, d) for f, d in shapes if f > d]
        up = [(d, f) for d, f in shapes if f > d]
        if len(down) == 1 and up and len(up) + 1 == len(shapes) and set(up) == {down[0][::-1]}:
            yield module
