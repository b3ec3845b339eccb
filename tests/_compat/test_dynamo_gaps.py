"""What Dynamo refuses and fxmem answers; Dynamo's own captures are as before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import funcname_cache, symbolic_convert
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.checkpoint import checkpoint

from fxmem._compat.dynamo_gaps import answered

WEIGHT = nn.Parameter(torch.randn(3, 3))


def embeddings_that_learn(x: Tensor) -> Tensor:
    h = x * 2
    h.requires_grad_(True)
    return h @ WEIGHT


def identity_that_does_not(x: Tensor) -> Tensor:
    eye = torch.eye(3)
    eye.requires_grad = False
    return x @ (WEIGHT - eye)


def name_of_a_class(x: Tensor) -> Tensor:
    return x if type(WEIGHT).__module__.startswith("torchao.") else x @ WEIGHT


def noise_with_tensors_as_bounds(x: Tensor) -> Tensor:
    bound = WEIGHT.detach().abs().max() * 0  # the numbers are all equal
    return (x + torch.zeros_like(x).uniform_(-bound, bound)) @ WEIGHT


def list_that_a_checkpoint_fills(x: Tensor) -> Tensor:
    """As a forward hook does that records what a layer returns."""
    states: list[Tensor] = []

    def layer(h: Tensor, *, scale: float) -> Tensor:
        states.append(h @ WEIGHT * scale)
        return states[-1]

    h = checkpoint(layer, x, use_reentrant=False, scale=2.0)
    return h + states[0]


class Shown(OptimizedModule):
    """As ``fully_shard`` changes the class of what it is given."""


COMPILED = torch.compile(nn.Linear(3, 3, bias=False), backend="eager")
COMPILED._orig_mod.weight = WEIGHT
COMPILED.__class__ = Shown
COMPILED.register_forward_hook(lambda module, args, output: output * 2)


def layer_of_another_class(x: Tensor) -> Tensor:
    return COMPILED(x)  # type: ignore[no-any-return]


KINDS = (
    embeddings_that_learn,
    identity_that_does_not,
    name_of_a_class,
    noise_with_tensors_as_bounds,
    list_that_a_checkpoint_fills,
    layer_of_another_class,
)


@pytest.mark.parametrize("fn", KINDS, ids=lambda f: f.__name__)
def test_it_is_captured_with_the_plain_gradient(fn: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3)
    with answered():
        got = torch.compile(fn, backend="eager", fullgraph=True)(x)
    want = fn(x)
    pairs = zip(*(torch.autograd.grad(y.sum(), WEIGHT) for y in (got, want)), strict=True)
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("fn", KINDS, ids=lambda f: f.__name__)
def test_dynamo_needs_the_answer(fn: Callable[[Tensor], Tensor]) -> None:
    """Without it there is nothing to answer, and this file may go."""
    torch._dynamo.reset()
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(fn, backend="eager", fullgraph=True)(torch.randn(2, 3))


def test_hooks_on_what_torch_compile_made_of_a_layer() -> None:
    """Dynamo itself leaves them out, without a word."""
    layer = torch.compile(nn.Linear(3, 3), backend="eager")
    layer.register_forward_hook(lambda module, args, output: output * 2)

    def fn(x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    x = torch.randn(2, 3)
    want = fn(x)
    for answers, factor in ((nullcontext(), 2), (answered(), 1)):
        torch._dynamo.reset()
        with answers:
            got = torch.compile(fn, backend="eager", fullgraph=True)(x)
        assert torch.equal(got * factor, want)


@pytest.mark.parametrize("reads", [False, True])
def test_names_of_functions_are_for_a_log_alone(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(funcname_cache, "cache", {})
    torch._dynamo.reset()
    log = symbolic_convert.trace_call_log
    before = log.level
    log.setLevel(logging.DEBUG if reads else logging.WARNING)
    try:
        with answered():
            torch.compile(embeddings_that_learn, backend="eager")(torch.randn(2, 3))
    finally:
        log.setLevel(before)
    assert bool(funcname_cache.cache) == reads
