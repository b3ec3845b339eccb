"""Functions of a state inside a small streamed model, against plain autograd in float64.

A case is ``f(x [B, T, D], ids [B, T])``, of the shape of ``x`` or what broadcasts to it. Several go
into one program, each added to the state, since a compilation costs more than a case; where a
program is wrong, every case runs alone to find the one at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, VOCAB, PAD = 8, 11, 3
Case = Callable[[Tensor, Tensor], Tensor]
_source = torch.Generator().manual_seed(1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=_source, dtype=torch.float64) * 0.5)


W, W2, MIX = parameter(D, D), parameter(D, D), parameter(D, D)
BIAS, SCALE, TABLE, HEAD = parameter(D), parameter(D), parameter(VOCAB, D), parameter(D, VOCAB)
PARAMETERS = {
    "w": W, "w2": W2, "mix": MIX, "bias": BIAS, "scale": SCALE, "table": TABLE, "head": HEAD,
}  # fmt: skip


def in_parts(groups: Sequence[Any]) -> list[Any]:
    """Indices of ``groups`` for ``parametrize``; all but the first are slow tests."""
    return [pytest.param(i, marks=[pytest.mark.slow] if i else []) for i in range(len(groups))]


def ids_of(batch: int, length: int) -> Tensor:
    """The first row begins with padding."""
    source = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCAB, (batch, length), generator=source)
    ids[0, : length // 3] = PAD
    return ids


def _attended(x: Tensor) -> Tensor:
    q = (F.layer_norm(x, (D,)) @ MIX)[:, None]
    return x + F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]


def model(cases: Sequence[Case]) -> Callable[[Tensor], Tensor]:
    def fn(ids: Tensor) -> Tensor:
        x = _attended(F.embedding(ids, TABLE))
        for case in cases:
            x = x + 0.3 * torch.tanh(case(x, ids))
        x = _attended(x)
        return F.cross_entropy((x @ HEAD).flatten(0, 1), ids.flatten())

    return fn


def results(fn: Any, ids: Tensor, more: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    named = PARAMETERS | more
    for p in named.values():
        p.grad = None
    loss = fn(ids)
    loss.backward()
    return {
        "loss": loss.detach(),
        **{n: p.grad.clone() for n, p in named.items() if p.grad is not None},
    }


def streamed(cases: Sequence[Case], chunk: int) -> Any:
    torch.compiler.reset()
    plan = Plan(stream=Stream(chunk=chunk, loss_chunk=chunk))
    return torch.compile(model(cases), backend=fxmem.backend(plan), fullgraph=True)


def difference(
    cases: Sequence[Case], lengths: Sequence[int], chunk: int, more: dict[str, nn.Parameter]
) -> float:
    step, worst = streamed(cases, chunk), 0.0
    for length in lengths:
        ids = ids_of(2, length)
        want = results(model(cases), ids, more)
        assert all(bool(torch.isfinite(v).all()) for v in want.values())
        worst = max(worst, largest_difference(results(step, ids, more), want)[0])
    return worst


def check(
    table: dict[str, Case], names: Sequence[str], lengths: Sequence[int] = (13, 9), chunk: int = 4,
    more: dict[str, nn.Parameter] | None = None,
) -> None:  # fmt: skip
    """Loss and every gradient equal plain autograd's to 1e-10."""
    if difference([table[n] for n in names], lengths, chunk, more or {}) < 1e-10:
        return
    alone = {n: difference([table[n]], lengths, chunk, more or {}) for n in names}
    raise AssertionError({n: e for n, e in alone.items() if not e < 1e-10} or "only together")
