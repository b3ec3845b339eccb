"""While streaming, nothing as large as ``T x T``, ``T x V`` or ``T x d_ff`` is allocated.

Asserted three times: on the shapes in every program, on the tensors that operators make (by
storage, so expanded views do not count), and on the bytes that the allocator hands out, which sees
inside operators and outside fxmem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxmem
from fxmem import Plan, Stream, api
from fxmem._compat.measure import memory_events
from fxmem.axes.sizes import degree, evaluate_shape
from fxmem.compiler.step import CompiledGraph
from fxmem.runtime.autograd import RegionFunction

T, CHUNK, HIDDEN, D_FF, VOCAB, WINDOW = 600, 32, 32, 320, 384, 96
WIDE = {"T x T": T * T, "T x V": T * VOCAB, "T x d_ff": T * D_FF}
LIMIT = min(WIDE.values())
BYTES = min(T * T, 4 * T * VOCAB, 4 * T * D_FF)
"""A mask of booleans has a byte per element, activations in float32 have four."""


class Largest(TorchDispatchMode):
    """The largest tensor made by an operator, in elements of its storage, and who made it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.op = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.itemsize
                if elements > self.elements:
                    self.elements, self.op = elements, f"{func} {list(leaf.shape)}"
        return result


@contextmanager
def watching(mode: Largest) -> Iterator[None]:
    """Enter ``mode`` around what the captured graph runs; Dynamo refuses one around its call."""

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            with mode:
                return function(*args)

        return watched

    with (
        mock.patch.object(CompiledGraph, "__call__", inside(CompiledGraph.__call__)),
        mock.patch.object(
            RegionFunction, "backward", staticmethod(inside(RegionFunction.backward))
        ),
    ):
        yield


def largest_bytes(net: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of the largest single allocation of a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        tiny.step(net, inputs)
    return max(size for _, size, device in memory_events(done) if device == "cpu")


def net(name: str) -> nn.Module:
    return tiny.model(
        name, hidden_size=HIDDEN, intermediate_size=D_FF, vocab_size=VOCAB,
        max_position_embeddings=T, sliding_window=WINDOW,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


def packed(size: int) -> dict[str, Tensor]:
    inputs = tiny.batch(size, T)
    positions = torch.cat([torch.arange(9), torch.arange(301), torch.arange(T - 310)])
    return {**inputs, "position_ids": positions.repeat(size, 1)}


CASES: dict[str, tuple[str, Callable[[int], dict[str, Tensor]]]] = {
    "causal": ("llama", lambda size: tiny.batch(size, T)),
    "left padding": ("llama", lambda size: tiny.batch(size, T, "left")),
    "right padding": ("llama", lambda size: tiny.batch(size, T, "right")),
    "window": ("mistral-5", lambda size: tiny.batch(size, T)),
    "window, left padding": ("mistral-5", lambda size: tiny.batch(size, T, "left")),
    "packed": ("llama", packed),
}


def _sized() -> Iterator[Any]:
    """Every case with one batch size by default, with the other as a slow test."""
    for i, case in enumerate(CASES):
        for size in (1, 2):
            marks = () if i % 2 == size - 1 else (pytest.mark.slow,)
            yield pytest.param(case, size, marks=marks)


@pytest.mark.parametrize(("case", "size"), list(_sized()))
def test_nothing_wide_is_allocated(case: str, size: int) -> None:
    name, make = CASES[case]
    model, inputs = net(name), make(size)
    fxmem.transform(model, Plan(stream=Stream(chunk=CHUNK, loss_chunk=CHUNK)))
    mode = Largest()
    with watching(mode):
        tiny.step(model, inputs)
    assert mode.elements >= size * T * HIDDEN, "the watch saw no residual stream"
    assert mode.elements < LIMIT, mode.op
    assert largest_bytes(model, inputs) < BYTES
    _check_programs(model)


def _check_programs(model: nn.Module) -> None:
    """Every tensor that outlives a chunk body grows with T at most linearly, below the limit."""
    seen = 0
    for graph in api._TRANSFORMED[model].graphs:
        for code in {id(c.code): c.code for c in graph.calls}.values():
            for program in code.programs.values():
                assert not program.barriers
                for name, (shape, _) in program.shapes.items():
                    assert degree(shape) <= 1, f"{program.name}: {name} {shape}"
                    elements = 1
                    for d in evaluate_shape(shape, graph.sizes):
                        elements *= d
                    assert elements < LIMIT, f"{program.name}: {name} {shape}"
                    seen += name not in program.inputs
    assert seen


def test_the_watches_see_what_plain_autograd_allocates() -> None:
    model, inputs = net("llama"), tiny.batch(1, T, "left")
    mode = Largest()
    with mode:
        tiny.step(model, inputs)
    assert mode.elements >= max(WIDE.values()), mode.op
    assert largest_bytes(model, inputs) >= BYTES
