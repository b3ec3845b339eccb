"""``torch.autograd.Function`` as users write them, by name: their backwards are not derivatives of
their forwards, so a gradient that is taken of the forward would show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function: Any = torch.autograd.Function


class Straight(Function):
    """Rounds; the gradient goes through where the value is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < ctx.bound), None


class Reverse(Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, inner: bool) -> Tensor:
        ctx.scale = scale if inner else 1.0
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.neg() * ctx.scale, None, None


class Clip(Function):
    """Clips the gradient: not linear in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clamp(-0.003, 0.002)


class Normed(Function):
    """Scales the gradient by its norm over all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 0.1 * grad / (1e-3 + grad.norm())


class Product(Function):
    """A linear layer with a weight that is rounded; no gradient for what needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = torch.round(16 * weight) / 16
        ctx.save_for_backward(x, weight)
        return x @ weight if bias is None else x @ weight + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        own = x.flatten(0, -2).T @ rows if ctx.needs_input_grad[1] else None
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ weight.T, own, bias


class Split(Function):
    """Several outputs: one saved, one that has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        big, sign = x.exp(), x > 0
        ctx.save_for_backward(big)
        ctx.mark_non_differentiable(sign)
        return big, x.sin(), sign

    @staticmethod
    def backward(ctx: Any, grad: Tensor, second: Tensor, _: Tensor) -> Any:
        (big,) = ctx.saved_tensors
        return 0.5 * grad * big + second.tanh()


class Nested(Function):
    """A function that calls others, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return Straight.apply(x, 1.0) + F.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return Clip.apply(grad) + Reverse.apply(grad * x, 0.5, True)


class Blocked(Function):
    """Gives no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cos()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None


class Fresh(Function):
    """Writes in place on tensors of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[..., ::2] *= 2
        ctx.save_for_backward(y)
        return y.relu_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        out = grad.clone()
        out[y <= 0] = 0
        return out.mul_(3)


class Autocast(Function):
    """Keeps its own precision in both directions."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.flatten(0, -2).T @ grad.flatten(0, -2)


def split(x: Tensor, _: nn.Parameter) -> Tensor:
    big, sine, sign = Split.apply(x)
    return big * 0.1 + sine * sign


def written(x: Tensor, w: nn.Parameter) -> Tensor:
    y = Straight.apply(x @ w, 1.0) * 2
    y[..., 0] = x[..., 1]
    return y


STEPS: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "straight": lambda x, w: Straight.apply(x @ w, 0.7),
    "reverse": lambda x, w: x + Reverse.apply(x @ w, 0.3, True),
    "reverse all": lambda x, w: Reverse.apply(x, 0.3, False) @ w,
    "clip": lambda x, w: Clip.apply(x @ w),
    "normed": lambda x, w: x @ w + Normed.apply(x),
    "product": lambda x, w: Product.apply(x, w, None),
    "product and bias": lambda x, w: Product.apply(x, w, w[0]),
    "frozen product": lambda x, w: Product.apply(x, w.detach(), None),
    "clipped weight": lambda x, w: x @ Clip.apply(w),
    "split": split,
    "nested": lambda x, w: Nested.apply(x @ w),
    "blocked": lambda x, w: x + Blocked.apply(x @ w) * (x @ w),
    "written": written,
    "fresh": lambda x, w: Fresh.apply(x @ w),
}
