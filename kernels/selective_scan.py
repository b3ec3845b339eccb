"""The selective scan of Mamba from a state that is given, in plain PyTorch.

The recurrence has a decay per channel and entry of the state, so it has no product form: it runs
row by row, forward and backward by hand, with the rows first in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Scan(torch.autograd.Function):
    """``h[t] = a[t] h[t - 1] + b[t]`` along dimension 0, from ``start``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        out, state = torch.empty_like(b), start
        for now, decay, new in zip(out.unbind(0), a.unbind(0), b.unbind(0), strict=True):
            torch.addcmul(new, decay, state, out=now)
            state = now
        ctx.save_for_backward(a, out, start)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, out, start = ctx.saved_tensors
        (grad,) = grads
        g = torch.empty_like(out)
        g[-1].copy_(grad[-1])
        rows, decays, given = g.unbind(0), a.unbind(0), grad.unbind(0)
        for t in range(len(rows) - 2, -1, -1):
            torch.addcmul(given[t], decays[t + 1], rows[t + 1], out=rows[t])
        da = torch.empty_like(a)
        torch.mul(g[1:], out[:-1], out=da[1:])
        torch.mul(g[0], start, out=da[0])
        return da, g, decays[0] * rows[0]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Result and last state.

    Args:
        u, delta, z: ``[B, d, T]``; A: ``[d, N]``; B, C: ``[B, N, T]``; D, delta_bias: ``[d]``.
        initial_state: ``[B, d, N]``; zeros without.
    """
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)[..., None]
    if delta_softplus:
        delta = F.softplus(delta)
    step, x, before, after = (v.permute(2, 0, 1) for v in (delta, u, B, C))
    decay = torch.exp(step[..., None] * A)
    new = (step[..., None] * before[:, :, None].float()) * x[..., None].float()
    start = decay.new_zeros(decay.shape[1:]) if initial_state is None else initial_state
    h = _Scan.apply(decay, new.to(decay.dtype), start.to(decay.dtype))
    y = torch.matmul(h.to(u.dtype), after[..., None].to(u.dtype)).squeeze(-1).permute(1, 2, 0)
    if D is not None:
        y = y + u * D[None, :, None]
    return y if z is None else y * F.silu(z), h[-1]
