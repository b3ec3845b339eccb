"""Derivatives by gates against autograd through plainly multiplied weights, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from double import everything_in_double
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prune_cases import build, coupled
from torch import Tensor, nn
from torch.func import functional_call

import fxmem
from fxmem.errors import PlanError
from fxmem.prune.shrink.gate_gradients import Gates
from fxmem.prune.units.units import UnitGroup, unit_of

HELD: dict[str, tuple[Any, fxmem.Coupling]] = {}


def cases(name: str) -> tuple[Any, fxmem.Coupling]:
    """The model and its units, traced once."""
    if name not in HELD:
        HELD[name] = build(name), coupled(name)
    return HELD[name]


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def multiplied(
    model: nn.Module, groups: list[UnitGroup], masks: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The oracle: every weight that reads a unit times its gate, autograd by the gates."""
    leaves = {g.name: masks[g.name].double().clone().requires_grad_() for g in groups}
    values = {n: p.detach() for n, p in model.named_parameters()}
    for group in groups:
        for name, axis, path in group.consumer:
            weight = values[name]
            scale = torch.cat([leaves[group.name], torch.ones(1, dtype=torch.float64)])
            shape = [1] * weight.dim()
            shape[axis] = -1
            owner = unit_of(weight.shape[axis], path, group.size)
            values[name] = weight * scale[owner].view(shape)
    out = functional_call(model, values, (), {**batch(), "use_cache": False})
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    return float(out.loss.detach()), dict(zip(leaves, grads, strict=True))


def close(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    top = max(float(x.abs().max()) for x in want.values())
    for name, x in want.items():
        assert float((got[name] - x).abs().max()) <= 1e-10 * max(1.0, top), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3_moe"])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(seed=st.integers(0, 2**16), part=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_equal_autograd_through_multiplied_weights(name: str, seed: int, part: float) -> None:
    with everything_in_double():
        model, units = cases(name)
        groups = [g for g in units.groups if g.kind in ("kv_groups", "mlp_channels")]
        generator = torch.Generator().manual_seed(seed)
        masks = {g.name: torch.rand(g.size, generator=generator) < part for g in groups}
        loss, want = multiplied(model, groups, masks)
        with Gates(model, groups) as gates:
            got, found = gates(batch(), masks)
        assert abs(got - loss) < 1e-10
        close(found, want)


def test_closed_gates_equal_the_masked_model_and_leave_it_as_it_was() -> None:
    with everything_in_double():
        model, units = cases("qwen3_moe")
        model.train()
        model.requires_grad_(True)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        groups = [g for g in units.groups if g.kind in ("kv_groups", "mlp_channels")]
        masks = {g.name: torch.arange(g.size) % 3 > 0 for g in groups}
        with fxmem.masked(model.eval(), fxmem.Masks.from_bools(units, masks), units):
            want = float(model(**batch()).loss.detach())
        model.train()
        with Gates(model, groups) as gates:
            assert abs(gates(batch(), masks)[0] - want) < 1e-10
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], v) for k, v in before.items())
        assert model.training and all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        model.eval()


def test_experts_have_the_derivative_of_their_output() -> None:
    with everything_in_double():
        model, units = cases("qwen3_moe")
        groups = [g for g in units.groups if g.kind == "experts"]
        masks = {g.name: torch.ones(g.size) for g in groups}
        with Gates(model, groups) as gates:
            close(gates(batch())[1], multiplied(model, groups, masks)[1])


@pytest.mark.parametrize("name", ["llama", "llama_mha_tied"])
def test_width_is_gated_where_it_is_written(name: str) -> None:
    """Against weights multiplied where they write; the tied head reads the plain embedding."""
    writers = {"embed_tokens": 1, "o_proj": 0, "down_proj": 0}
    with everything_in_double():
        model, units = cases(name)
        groups = [g for g in units.groups if g.kind == "width"]
        (group,) = groups
        half = torch.linspace(0.2, 1.0, group.size, dtype=torch.float64, requires_grad=True)
        values = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
        for key in values:
            axis = writers.get(key.split(".")[-2])
            if axis is not None:
                values[key] = values[key] * (half if axis else half[:, None])
        out = functional_call(model, values, (), {**batch(), "use_cache": False}, tie_weights=False)
        (want,) = torch.autograd.grad(out.loss, half)
        with Gates(model, groups) as gates:
            loss, found = gates(batch(), {group.name: half.detach()})
            assert abs(loss - float(out.loss.detach())) < 1e-10
            close(found, {group.name: want})
            closed = torch.arange(group.size) % 4 > 0
            loss, _ = gates(batch(), {group.name: closed})
        masks = fxmem.Masks.from_bools(units, {group.name: closed})
        small: Any = fxmem.materialize(model, masks, units)
        assert abs(loss - float(small(**batch()).loss.detach())) < 1e-10


def test_a_batch_without_labels_is_named() -> None:
    model, units = cases("llama")
    with Gates(model, list(units.groups)) as gates, pytest.raises(PlanError, match="labels"):
        gates({"input_ids": batch()["input_ids"]})
