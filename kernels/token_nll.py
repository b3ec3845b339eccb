"""Negative log-likelihood of one target per row of logits, with its backward.

Letters: N rows (tokens), V vocabulary. ``nll = logsumexp(logits) - logits[target]``; rows whose
target is ``ignore_index`` give 0 and a zero gradient. The backward is ``(softmax(logits) -
onehot(target)) * grad`` from the saved logsumexp, so that neither log-probabilities nor a one-hot
matrix is stored. Losses (mean, sum, DPO, GRPO) are built from it by plain ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmem.program.body_op import body_op

TILE = 1 << 18
"""Elements of logits per step: the passes over a step find it in cache; bounds the temporaries."""


def _blocks(n: int, v: int, tile: int = TILE) -> list[tuple[int, int]]:
    step = max(1, tile // max(v, 1))
    return [(a, min(a + step, n)) for a in range(0, n, step)]


@torch.library.custom_op("fxmem::token_nll", mutates_args=())
def token_nll(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``logits [N, V]``, ``target [N]`` -> ``(nll [N], logsumexp [N])``, dtype of the logits."""
    n, v = logits.shape
    lse = torch.empty(n, dtype=logits.dtype, device=logits.device)
    for a, b in _blocks(n, v):
        torch.logsumexp(logits[a:b], -1, out=lse[a:b])
    ignored = target == ignore_index
    picked = logits.gather(1, target.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    return (lse - picked).masked_fill_(ignored, 0), lse


@token_nll.register_fake
def _(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(target.shape), logits.new_empty(target.shape)


@body_op(writes=(5,), aliases=(5,), fake=lambda grad, x, *_: x.new_empty(x.shape))
def backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits; ``out`` may be ``logits`` itself where they are not needed again."""
    n, v = logits.shape
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    ignored = target == ignore_index
    # where, not times zero: a mean over no valid token has an infinite factor
    grad = grad.masked_fill(ignored, 0).unsqueeze(1)
    index = target.masked_fill(ignored, 0).unsqueeze(1)
    one = torch.full((n, 1), -1.0, dtype=out.dtype, device=out.device)
    for a, b in _blocks(n, v):
        torch.sub(logits[a:b], lse[a:b].unsqueeze(1), out=out[a:b])
        out[a:b].exp_().scatter_add_(1, index[a:b], one[a:b]).mul_(grad[a:b])
    return out


@body_op(
    writes=(0,), fake=lambda x, *_: (x.new_empty(x.shape[:1]), x.new_empty(x.shape[:1])),
    average=lambda *args: _forward_at_once(*args),
)  # fmt: skip
def forward_(
    logits: Tensor, target: Tensor, ignore_index: int, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """``(nll [N], sums [N])``; the logits become ``exp(logits - row maximum)``, which
    :func:`backward_` needs and which costs one exponential per logit less than
    :func:`token_nll` and :func:`backward` together.
    """
    n, v = logits.shape
    peak, sums = logits.new_empty(n, 1), logits.new_empty(n)
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0).unsqueeze(1)
    picked = logits.gather(1, index)
    for a, b in _blocks(n, v, tile):
        rows, top = logits[a:b], peak[a:b]
        torch.amax(rows, 1, keepdim=True, out=top)
        rows.sub_(top).exp_()
        torch.sum(rows, 1, out=sums[a:b])
    nll = sums.log().sub_(picked.sub_(peak).squeeze(1))
    return nll.masked_fill_(ignored, 0), sums


@body_op(
    writes=(1,), aliases=(1,), fake=lambda grad, x, *_: x.new_empty(x.shape),
    average=lambda *args: _backward_at_once(*args),
)  # fmt: skip
def backward_(
    grad: Tensor, exponentials: Tensor, target: Tensor, sums: Tensor, ignore_index: int,
    tile: int = TILE,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, in place of what :func:`forward_` left."""
    n, v = exponentials.shape
    ignored = target == ignore_index
    # where, not times zero: a mean over no valid token has an infinite factor
    grad = grad.masked_fill(ignored, 0)
    index = target.masked_fill(ignored, 0).unsqueeze(1)
    factor = (grad / sums).unsqueeze(1)
    for a, b in _blocks(n, v, tile):
        exponentials[a:b].mul_(factor[a:b])
    return exponentials.scatter_add_(1, index, -grad.unsqueeze(1))


def _forward_at_once(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Allocates as :func:`forward_` does, in one step however many rows there are."""
    return forward_(logits, target, ignore_index, max(1, logits.numel()))


def _backward_at_once(
    grad: Tensor, exponentials: Tensor, target: Tensor, sums: Tensor, ignore_index: int
) -> Tensor:
    """Likewise for :func:`backward_`."""
    return backward_(grad, exponentials, target, sums, ignore_index, max(1, exponentials.numel()))


@torch.library.custom_op("fxmem::token_nll_backward", mutates_args=())
def token_nll_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    """``grad [N]`` -> gradient of the logits ``[N, V]``."""
    return backward(grad, logits, target, lse, ignore_index)


@token_nll_backward.register_fake
def _(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output):
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx, grad, _dlse):
    logits, target, lse = ctx.saved_tensors
    return token_nll_backward(grad, logits, target, lse, ctx.ignore_index), None, None


token_nll.register_autograd(_vjp, setup_context=_setup)
