"""Ops whose chunk needs a small state of the chunk before: sums that run along the sequence,
shifts, convolutions over earlier tokens, linear recurrences.

Each is a pair: the op on the whole sequence, which starts from a state of zeros, and the *step* of
one chunk, ``step(state, *arguments) -> (*results, next state)``. The op's last result is the state
that came in, with a first dimension that counts chunks. A state is linear in what it was made from,
so zeros are the start in both directions: the forward takes states up the sequence, the backward
takes their gradients down, and the backward of each op here is such an op again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxmem.program.body_op import body_op


def _state(x: Tensor, dim: int, rows: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = rows
    return x.new_zeros(1, *shape)


def _as_second(state: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Fake of a step whose result is like its first operand."""
    return x.new_empty(x.shape), torch.empty_like(state)


@body_op(fake=_as_second)
def delay_step(state: Tensor, x: Tensor, dim: int, rows: int) -> tuple[Tensor, Tensor]:
    """State: the last ``rows`` rows before ``x``, or the first ``-rows`` after it."""
    count, halo = x.shape[dim], abs(rows)
    joined = torch.cat([state[0], x] if rows > 0 else [x, state[0]], dim)
    moved, rest = (0, count) if rows > 0 else (halo, 0)
    return joined.narrow(dim, moved, count), joined.narrow(dim, rest, halo).unsqueeze(0)


@torch.library.custom_op("fxmem::delay", mutates_args=())
def delay(x: Tensor, dim: int, rows: int) -> tuple[Tensor, Tensor]:
    """``y[r] = x[r - rows]`` along ``dim``, zero where there is no such row."""
    state = _state(x, dim, abs(rows))
    return delay_step(state, x, dim, rows)[0].clone(), state


@delay.register_fake
def _(x: Tensor, dim: int, rows: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _state(x, dim, abs(rows))


@body_op(fake=_as_second)
def running_sum_step(state: Tensor, x: Tensor, dim: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """State: the sum of all rows before, or after."""
    y = (x.flip(dim).cumsum(dim).flip(dim) if reverse else x.cumsum(dim)) + state[0]
    rows = x.shape[dim]
    return y, y.narrow(dim, 0 if reverse else rows - 1, 1).unsqueeze(0) if rows else state


@torch.library.custom_op("fxmem::running_sum", mutates_args=())
def running_sum(x: Tensor, dim: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """The sum of all rows up to each, or from each on."""
    state = _state(x, dim, 1)
    return running_sum_step(state, x, dim, reverse)[0], state


@running_sum.register_fake
def _(x: Tensor, dim: int, reverse: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _state(x, dim, 1)


@body_op(fake=_as_second)
def running_logsumexp_step(
    state: Tensor, x: Tensor, dim: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """State: a logarithm and a factor of the sum of all rows before, or after; both 0 at first."""
    y = x.flip(dim).logcumsumexp(dim).flip(dim) if reverse else x.logcumsumexp(dim)
    level, factor = state[0].split(1, dim)
    y, rows = torch.logaddexp(y, level + factor.log()), x.shape[dim]
    if not rows:
        return y, state
    last = y.narrow(dim, 0 if reverse else rows - 1, 1)
    return y, torch.cat([last, torch.ones_like(last)], dim).unsqueeze(0)


@torch.library.custom_op("fxmem::running_logsumexp", mutates_args=())
def running_logsumexp(x: Tensor, dim: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """``log sum exp`` of all rows up to each, or from each on."""
    state = _state(x, dim, 2)
    return running_logsumexp_step(state, x, dim, reverse)[0], state


@running_logsumexp.register_fake
def _(x: Tensor, dim: int, reverse: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _state(x, dim, 2)


def _doubled(a: Tensor, b: Tensor) -> Tensor:
    """``h[t] = a[t] h[t - 1] + b[t]`` along dimension 0 in ``log2`` of its length passes."""
    reach = 1
    while reach < a.shape[0]:
        b = torch.cat([b[:reach], b[reach:] + a[reach:] * b[:-reach]])
        a = torch.cat([a[:reach], a[reach:] * a[:-reach]])
        reach *= 2
    return b


def _one_by_one(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """As :func:`_doubled`, row by row: the fewest operations, where calls cost little."""
    out = torch.empty_like(b)
    for now, decay, new in zip(out.unbind(0), a.unbind(0), b.unbind(0), strict=True):
        torch.addcmul(new, decay, state, out=now)
        state = now
    return out


def _without_rows(
    state: Tensor, a: Tensor, b: Tensor, dim: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Allocates what the step does, without its loop."""
    rows = [x.movedim(dim, 0).clone() for x in (a, b)]
    out = rows[1].clone()
    del rows
    return out.movedim(0, dim).contiguous(), torch.empty_like(state)


@body_op(fake=_as_second, average=_without_rows)
def linear_recurrence_step(
    state: Tensor, a: Tensor, b: Tensor, dim: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """State: the row of ``h`` before, or after."""
    if not b.shape[dim]:
        return torch.empty_like(b), state
    rows, new = (x.movedim(dim, 0).contiguous() for x in (a.expand_as(b), b))
    if reverse:
        rows, new = rows.flip(0), new.flip(0)
    first = state[0].movedim(dim, 0)
    if b.device.type == "cpu":
        out = _one_by_one(rows, new, first[0])
    else:
        out = _doubled(rows, torch.cat([new[:1] + rows[:1] * first, new[1:]]))
    last = out[-1:].movedim(0, dim).unsqueeze(0)
    return (out.flip(0) if reverse else out).movedim(0, dim).contiguous(), last


@torch.library.custom_op("fxmem::linear_recurrence", mutates_args=())
def linear_recurrence(a: Tensor, b: Tensor, dim: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """``h[t] = a[t] h[t - 1] + b[t]`` along ``dim``, from zero; reversed with ``h[t + 1]``.

    ``a`` and ``b`` of one shape.
    """
    state = _state(b, dim, 1)
    return linear_recurrence_step(state, a, b, dim, reverse)[0], state


@linear_recurrence.register_fake
def _(a: Tensor, b: Tensor, dim: int, reverse: bool) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), _state(b, dim, 1)


def _conv_fake(state: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2]), torch.empty_like(state)


@body_op(fake=_conv_fake)
def causal_conv_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int
) -> tuple[Tensor, Tensor]:
    """State: the rows of ``x`` before that the kernel reaches."""
    joined = torch.cat([state[0], x], 2)
    rest = joined.narrow(2, x.shape[2], state.shape[3]).unsqueeze(0)
    if not x.shape[2]:
        return x.new_empty(x.shape[0], weight.shape[0], 0), rest
    return F.conv1d(joined, weight, bias, dilation=dilation, groups=groups), rest


def _reach(weight: Tensor, dilation: int) -> int:
    return (weight.shape[2] - 1) * dilation


@torch.library.custom_op("fxmem::causal_conv", mutates_args=())
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int
) -> tuple[Tensor, Tensor]:
    """A convolution over each row and those before it: ``x [B, C, T]``, ``weight [O, C/groups,
    K]`` -> ``[B, O, T]``.
    """
    state = _state(x, 2, _reach(weight, dilation))
    return causal_conv_step(state, x, weight, bias, dilation, groups)[0], state


@causal_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], weight.shape[0], x.shape[2]),
        _state(x, 2, _reach(weight, dilation)),
    )


def _conv_backward_fake(
    state: Tensor, grad: Tensor, x: Tensor, weight: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape), weight.new_empty(weight.shape), grad.new_empty(grad.shape[1]),
        torch.empty_like(state),
    )  # fmt: skip


@body_op(fake=_conv_backward_fake)
def causal_conv_backward_step(
    state: Tensor, grad: Tensor, x: Tensor, weight: Tensor, before: Tensor, dilation: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """State: the gradient that later rows have for the last rows of ``x``."""
    rows, reach = x.shape[2], before.shape[3]
    joined = torch.cat([before[0], x], 2)
    if rows:
        found = torch.ops.aten.convolution_backward.default(
            grad, joined, weight, None, [1], [0], [dilation], False, [0], groups,
            [True, True, False],
        )  # fmt: skip
        dx, dw = found[0], found[1]
    else:
        dx, dw = torch.zeros_like(joined), torch.zeros_like(weight)
    dx.narrow(2, rows, reach).add_(state[0])
    earlier, own = dx.split([reach, rows], 2)
    return own.contiguous(), dw, grad.sum((0, 2)), earlier.unsqueeze(0)


@torch.library.custom_op("fxmem::causal_conv_backward", mutates_args=())
def causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, before: Tensor, dilation: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and a bias; ``before``: what :func:`causal_conv` gave."""
    state = torch.zeros_like(before)
    found = causal_conv_backward_step(state, grad, x, weight, before, dilation, groups)
    return (*found[:3], state)


@causal_conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, before: Tensor, dilation: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _conv_backward_fake(before, grad, x, weight)


def _delay_setup(ctx, inputs, output):
    _, ctx.dim, ctx.rows = inputs


def _delay_vjp(ctx, grad, _):
    return delay(grad, ctx.dim, -ctx.rows)[0], None, None


def _running_sum_setup(ctx, inputs, output):
    _, ctx.dim, ctx.reverse = inputs


def _running_sum_vjp(ctx, grad, _):
    return running_sum(grad, ctx.dim, not ctx.reverse)[0], None, None


def _linear_recurrence_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])
    ctx.dim, ctx.reverse = inputs[2:]


def _linear_recurrence_vjp(ctx, grad, _):
    """``g[t] = grad[t] + a[t + 1] g[t + 1]`` is a recurrence the other way."""
    a, h = ctx.saved_tensors
    dim, back = ctx.dim, 1 if ctx.reverse else -1
    g = linear_recurrence(delay(a, dim, back)[0], grad, dim, not ctx.reverse)[0]
    return g * delay(h, dim, -back)[0], g, None, None


def _conv_setup(ctx, inputs, output):
    x, weight, ctx.bias, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(x, weight, output[1])


def _conv_vjp(ctx, grad, _):
    dx, dw, db, _ = causal_conv_backward(grad, *ctx.saved_tensors, ctx.dilation, ctx.groups)
    return dx, dw, None if ctx.bias is None else db, None, None


delay.register_autograd(_delay_vjp, setup_context=_delay_setup)
running_sum.register_autograd(_running_sum_vjp, setup_context=_running_sum_setup)
linear_recurrence.register_autograd(_linear_recurrence_vjp, setup_context=_linear_recurrence_setup)
causal_conv.register_autograd(_conv_vjp, setup_context=_conv_setup)

STEPS = {
    "fxmem.delay.default": delay_step,
    "fxmem.running_sum.default": running_sum_step,
    "fxmem.running_logsumexp.default": running_logsumexp_step,
    "fxmem.linear_recurrence.default": linear_recurrence_step,
    "fxmem.causal_conv.default": causal_conv_step,
    "fxmem.causal_conv_backward.default": causal_conv_backward_step,
}
"""By op: what a chunk runs."""


def running_product(x: Tensor, dim: int) -> Tensor:
    """``cumprod`` by a recurrence; its backward divides by nothing, so zeros are exact too."""
    shape = [1] * x.dim()
    shape[dim] = -1
    first = torch.arange(x.shape[dim], device=x.device).reshape(shape) == 0
    return linear_recurrence(x, torch.where(first, x, 0.0), dim, False)[0]


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int
) -> Tensor:
    """``x [B, C, T]``, in the precision that autocast gives a convolution."""
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(low) for t in (x, weight))
        bias = None if bias is None else bias.to(x.dtype)
    return causal_conv(x, weight, bias, dilation, groups)[0]
