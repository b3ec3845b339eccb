"""A linear map whose weight is chosen per row: ``y[s] = W[index[s]] @ x[s]``, the core of a mixture
of experts.

Letters: S rows (token, choice) pairs, E experts, O output and I input features. Rows are grouped by
expert inside the op, so routing never shows as a sort over all tokens: the op acts on each row
alone and may be cut along S. An expert without rows in a chunk contributes zero to its weight
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmem.program import body_ops as runtime


@torch.library.custom_op("fxmem::expert_linear", mutates_args=())
def expert_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """``x [S, I]``, ``weight [E, O, I]``, ``index [S]`` -> ``[S, O]``."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, rows in runtime.expert_rows(index, weight.shape[0]):
        out[rows] = x[rows] @ weight[expert].t()
    return out


@expert_linear.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.custom_op("fxmem::expert_weight_grad", mutates_args=())
def expert_weight_grad(grad: Tensor, x: Tensor, index: Tensor, experts: int) -> Tensor:
    """``grad [S, O]``, ``x [S, I]`` -> gradient of the weights ``[E, O, I]``."""
    out = x.new_zeros(experts, grad.shape[1], x.shape[1])
    runtime.add_expert_weight(out, grad, x, index)
    return out


@expert_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, index: Tensor, experts: int) -> Tensor:
    return x.new_empty((experts, grad.shape[1], x.shape[1]))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _vjp(ctx, grad):
    x, weight, index = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = expert_linear(grad, weight.transpose(1, 2), index)
    if ctx.needs_input_grad[1]:
        dw = expert_weight_grad(grad, x, index, weight.shape[0])
    return dx, dw, None


expert_linear.register_autograd(_vjp, setup_context=_setup)
