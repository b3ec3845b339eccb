"""Any function that runs along the sequence with a state that it takes and gives: one op for all.

Libraries' kernels for linear attention and state spaces (the gated delta rule, SSD and their kin)
have such a function each, with many arguments, and a fast form for a GPU beside one in plain
PyTorch. An op per kind would be six of them, each with a backward to write; a scan with a step per
token would have none of their block products. So the op here calls the function itself on each
chunk, from the state that the chunk began with, and its backward is autograd's on that chunk. What
it knows of a function is which axes its tensors have (:class:`~fxmem.rules.carried.Called`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmem._compat.dispatch import recorded
from fxmem.program.body_op import body_op
from fxmem.rules.carried import CALLS, Called


def _sizes(called: Called, tensors: Sequence[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = dict(called.sizes)
    for dims, t in zip(called.ins, tensors, strict=True):
        found.update(zip(dims, t.shape, strict=True))
    return found


def _state(called: Called, tensors: Sequence[Tensor]) -> Tensor:
    sizes = _sizes(called, tensors)
    shape = [sizes[x] for x in called.state]
    return tensors[0].new_zeros([1, *shape], dtype=called.state_type())


def _out(called: Called, tensors: Sequence[Tensor]) -> Tensor:
    sizes = _sizes(called, tensors)
    return tensors[0].new_empty([sizes[x] for x in called.out], dtype=called.out_type())


def _run(called: Called, tensors: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    device = tensors[0].device.type
    cast = called.autocast
    with torch.autocast(device, cast) if cast is not None else contextlib.nullcontext():
        y, after = called.call(tensors, state[0])
    return y.contiguous(), after.to(state.dtype).unsqueeze(0)


def _step_fake(state: Tensor, tensors: Sequence[Tensor], key: str) -> tuple[Tensor, Tensor]:
    return _out(CALLS[key], tensors), torch.empty_like(state)


def _step_average(state: Tensor, tensors: Sequence[Tensor], key: str) -> tuple[Tensor, Tensor]:
    """About what such functions hold at once."""
    copies = [torch.empty_like(t, dtype=state.dtype) for t in tensors for _ in range(2)]
    del copies
    return _step_fake(state, tensors, key)


@body_op(fake=_step_fake, average=_step_average)
def recurrence_step(state: Tensor, tensors: Sequence[Tensor], key: str) -> tuple[Tensor, Tensor]:
    """State: what the function gave for the chunk before."""
    called = CALLS[key]
    if not _sizes(called, tensors)["t"]:
        return _out(called, tensors), state
    return _run(called, tensors, state)


@torch.library.custom_op("fxmem::recurrence", mutates_args=())
def recurrence(tensors: Sequence[Tensor], key: str) -> tuple[Tensor, Tensor, Tensor]:
    """Result and last state of the function that ``key`` stands for in
    :data:`~fxmem.rules.carried.CALLS`.
    """
    state = _state(CALLS[key], tensors)
    y, after = recurrence_step(state, tensors, key)
    return y, after.clone(), state


@recurrence.register_fake
def _(tensors: Sequence[Tensor], key: str) -> tuple[Tensor, Tensor, Tensor]:
    called = CALLS[key]
    return _out(called, tensors), _state(called, tensors), _state(called, tensors)


Tape = tuple[Tensor, Tensor, list[Tensor]]
"""A result and the next state with their graph, and its leaves."""


def _taped_fake(
    state: Tensor, tensors: Sequence[Tensor], key: str, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, None]:
    return (*_step_fake(state, tensors, key), None)


def _taped_average(
    state: Tensor, tensors: Sequence[Tensor], key: str, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """About what the graph holds."""
    return (
        *_step_fake(state, tensors, key),
        [torch.empty_like(t, dtype=state.dtype) for t in tensors for _ in range(4)],
    )


@body_op(fake=_taped_fake, average=_taped_average)
def recurrence_taped(
    state: Tensor, tensors: Sequence[Tensor], key: str, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tape | None]:
    """As :func:`recurrence_step`, for a body that runs the backward of the chunk as well."""
    if not _sizes(CALLS[key], tensors)["t"]:
        return (*recurrence_step(state, tensors, key), None)
    with recorded():
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        before = state.detach().clone().requires_grad_()
        y, after = _run(CALLS[key], leaves, before)
    chosen = [*(t for t, w in zip(leaves, wanted, strict=True) if w), before]
    return y.detach(), after.detach(), (y, after, chosen)


def _grads_fake(
    state: Tensor, grad: Tensor, last: Tensor, tensors: Sequence[Tensor], before: Tensor, key: str,
    wanted: Sequence[bool], tape: Any = None,
) -> list[Tensor]:  # fmt: skip
    like = [t for t, w in zip(tensors, wanted, strict=True) if w]
    return [*(t.new_empty(t.shape) for t in like), before.new_empty(state.shape)]


def _grads_average(
    state: Tensor, grad: Tensor, last: Tensor, tensors: Sequence[Tensor], before: Tensor, key: str,
    wanted: Sequence[bool], tape: Any = None,
) -> list[Tensor]:  # fmt: skip
    copies = [torch.empty_like(t, dtype=state.dtype) for t in tensors for _ in range(3)]
    del copies
    return _grads_fake(state, grad, last, tensors, before, key, wanted)


@body_op(fake=_grads_fake, average=_grads_average)
def recurrence_backward_step(
    state: Tensor, grad: Tensor, last: Tensor, tensors: Sequence[Tensor], before: Tensor, key: str,
    wanted: Sequence[bool], tape: Tape | None = None,
) -> list[Tensor]:  # fmt: skip
    """State: the gradient of what the function gives on."""
    if tape is None:
        tape = recurrence_taped(before, tensors, key, wanted)[2]
    if tape is None:
        like = [t for t, w in zip(tensors, wanted, strict=True) if w]
        return [*map(torch.zeros_like, like), state]
    y, after, leaves = tape
    found = torch.autograd.grad(
        [y, after], leaves, [grad, state], allow_unused=True, materialize_grads=True
    )
    return [g.contiguous() for g in found]


@torch.library.custom_op("fxmem::recurrence_backward", mutates_args=())
def recurrence_backward(
    grad: Tensor, last: Tensor, tensors: Sequence[Tensor], before: Tensor, key: str,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors that are ``wanted``, and the state that came in; ``last``: the
    gradient of the last state.
    """
    found = recurrence_backward_step(last, grad, last, tensors, before, key, wanted)
    return [*found[:-1], last.clone()]


@recurrence_backward.register_fake
def _(
    grad: Tensor, last: Tensor, tensors: Sequence[Tensor], before: Tensor, key: str,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return _grads_fake(last, grad, last, tensors, before, key, wanted)


def _setup(ctx, inputs, output):
    tensors, ctx.key = inputs
    ctx.wanted = [t.requires_grad for t in tensors]
    ctx.save_for_backward(*tensors, output[2])


def _vjp(ctx, grad, last, _):
    *tensors, before = ctx.saved_tensors
    called = CALLS[ctx.key]
    grad = torch.zeros_like(_out(called, tensors)) if grad is None else grad
    last = _state(called, tensors) if last is None else last
    *found, _state_in = recurrence_backward(grad, last, tensors, before, ctx.key, ctx.wanted)
    given = iter(found)
    return [next(given) if w else None for w in ctx.wanted], None


recurrence.register_autograd(_vjp, setup_context=_setup)
