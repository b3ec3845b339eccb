"""``lower="inductor"`` beside eager bodies: precisions, experts, roles, adapters, pruned widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import prune_cases
import pytest
import tiny
import torch
from double import compiled_in_double, largest_difference
from role_cases import Case, case, deeper
from test_low_rank import adapters
from torch import Tensor, nn

import fxmem
from fxmem import Masks, Plan, Stream
from fxmem.backends.inductor import STATS
from fxmem.roles.roles import Role

STREAM = Stream(chunk=8, loss_chunk=8)
PLANS = {lower: Plan(stream=STREAM, lower=lower) for lower in ("eager", "inductor")}  # type: ignore[arg-type]
Step = Callable[[nn.Module], tuple[float, dict[str, Tensor]]]


@pytest.fixture(autouse=True)
def nothing_falls_back() -> Iterator[None]:
    """What Inductor was given compiled, and ran for every call."""
    failed, calls = dict(STATS.failed), STATS.eager_calls
    yield
    assert failed == STATS.failed and calls == STATS.eager_calls


def both(net: nn.Module, step: Step, tolerance: float) -> None:
    """One step of ``net`` with eager and with compiled bodies."""
    got = {}
    bodies = STATS.bodies
    for lower, plan in PLANS.items():
        got[lower] = step(fxmem.transform(copy.deepcopy(net), plan))
    assert STATS.bodies > bodies
    (loss, grads), (want, reference) = got["inductor"], got["eager"]
    assert abs(loss - want) <= tolerance * abs(want)
    worst, where = largest_difference(grads, reference)
    assert worst <= tolerance, where


def step(net: nn.Module) -> tuple[float, dict[str, Tensor]]:
    return tiny.step(net, tiny.batch(2, 23, "mixed"))


def in_double(net: nn.Module) -> tuple[float, dict[str, Tensor]]:
    with compiled_in_double():
        return step(net)


def under_autocast(net: nn.Module) -> tuple[float, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        return tiny.step(net, tiny.batch(2, 23))


# One unit in the last place of bfloat16 is 2^-8; Inductor keeps some values in float32 that eager
# operators round.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "step", "tolerance"),
    [
        (lambda: tiny.model("llama").bfloat16(), step, 2.0**-5),
        (lambda: tiny.model("gpt2").double(), in_double, 1e-10),
        (lambda: tiny.model("gemma2").double(), in_double, 1e-10),
        (lambda: tiny.model("mixtral", default_experts=True), step, 1e-5),
        (lambda: tiny.model("qwen3_moe", default_experts=True), step, 1e-5),
        (lambda: tiny.model("llama"), under_autocast, 2.0**-5),
    ],
    ids=["bf16", "gpt2", "gemma2", "mixtral", "qwen3_moe", "autocast"],
)
def test_equal_to_eager_bodies(net: Callable[[], nn.Module], step: Step, tolerance: float) -> None:
    both(net(), step, tolerance)


def roles_step(made: Case) -> dict[str, Tensor]:
    """Gradients and, where roles update inside the backward, how far weights moved."""
    before = {n: p.detach().clone() for n, p in made.net.named_parameters()}
    made.net(**tiny.batch(2, 23)).loss.backward()
    named = dict(made.net.named_parameters())
    out = {n: before[n] - p.detach() for n, p in named.items()}
    out |= {f"{n}.grad": p.grad for n, p in named.items() if p.grad is not None}
    for p, a in made.table._adapters.items():
        name = next(n for n, q in named.items() if q is p)
        out |= {f"{name}.{k}": g for k in ("up", "down") if (g := getattr(a, k).grad) is not None}
    return out


@pytest.mark.slow
@pytest.mark.parametrize("other", [Role.UPDATE, Role.LOW_RANK])
@pytest.mark.parametrize("chunk", [8, 64], ids=["chunks", "one chunk"])
def test_roles_and_adapters(other: Role, chunk: int) -> None:
    net, got = tiny.model("llama", num_hidden_layers=3).double(), {}
    for lower in ("eager", "inductor"):
        plan = Plan(stream=Stream(chunk=chunk, loss_chunk=chunk), lower=lower)  # type: ignore[arg-type]
        own = copy.deepcopy(net)
        made = case(
            own, deeper(own, 1, other), plan, adapters() if other is Role.LOW_RANK else None
        )
        with compiled_in_double():
            got[lower] = roles_step(made)
    assert any(g.any() for n, g in got["eager"].items() if n.startswith("model.layers.2"))
    worst, where = largest_difference(got["inductor"], got["eager"])
    assert worst <= 1e-10, where


@pytest.mark.slow
def test_pruned_widths_compile_twice_at_most_per_schedule() -> None:
    """Heads and channels of every layer at seven widths, each exact.

    Layers with few heads, or fewer channels than the hidden size, keep other values and so have
    another schedule; 0.4, 0.3 and 0.35 are below both. Each of the two schedules here is compiled
    for its first width and once for all others. (One head is a form of its own, as in Dynamo.)
    """
    model = prune_cases.build("llama").train()
    units = fxmem.coupling(model)
    compiled = []
    for keep in (0.9, 0.6, 0.4, 0.3, 0.7, 0.35, 1.0):
        inner = [g for g in units.groups if g.kind != "width"]
        bools = {g.name: torch.arange(g.size) < round(keep * g.size) for g in inner}
        small: Any = fxmem.materialize(model, Masks.from_bools(units, bools), units)
        with compiled_in_double():
            both(small, lambda net: tiny.step(net, tiny.batch(2, 23)), 1e-10)
        compiled.append(STATS.compiled)
    first, second, third, fourth, *others = compiled
    assert second <= 2 * first and fourth - second <= second
    assert first < second <= third <= fourth == others[0] == others[1] == others[2]
