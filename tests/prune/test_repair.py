"""Repair by least squares: exact where it can be, never worse on held-in rows, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prune_cases import build, coupled
from torch import Tensor

import fxmem
from fxmem.errors import PlanError
from fxmem.prune.shrink import repair as mend

HELD: dict[str, tuple[Any, fxmem.Coupling]] = {}


def cases(name: str) -> tuple[Any, fxmem.Coupling]:
    if name not in HELD:
        HELD[name] = build(name), coupled(name)
    return HELD[name]


def data(seed: int, count: int = 4) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (2, 13), generator=g) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def solved(model: Any, units: fxmem.Coupling, masks: fxmem.Masks, rows: int) -> Any:
    """The smaller model with the whole of every solution, whatever the loss says."""
    small: Any = fxmem.materialize(model, masks, units)
    found = mend._consumers(model, units, masks, set())
    joined = {k: torch.cat([b[k] for b in data(0, rows)]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        mend._solve_in_turn(model, units, masks, found, joined, 0.75)
        for consumer in found:
            mend._add(small, consumer, 1.0)
    assert found
    return small


def drawn(units: fxmem.Coupling, part: float, seed: int) -> fxmem.Masks:
    g = torch.Generator().manual_seed(seed)
    bools = {}
    for group in units.groups:
        keep = torch.rand(group.size, generator=g) < part
        bools[group.name] = keep if group.kind in ("kv_groups", "mlp_channels") else keep | True
    return fxmem.Masks.from_bools(units, bools)


def loss(model: Any, rows: list[dict[str, Tensor]]) -> float:
    joined = {k: torch.cat([b[k] for b in rows]) for k in rows[0]}
    with torch.no_grad():
        return float(model(**joined).loss)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3_moe"])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(seed=st.integers(0, 2**16), part=st.sampled_from([0.0, 0.4, 0.8, 1.0]))
def test_never_worse_on_held_in_rows(name: str, seed: int, part: float) -> None:
    model, units = cases(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks, rows = drawn(units, part, seed), data(seed)
    plain: Any = fxmem.materialize(model, masks, units)
    mended: Any = fxmem.materialize(model, masks, units, repair=rows)
    assert loss(mended, rows[-1:]) <= loss(plain, rows[-1:])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    changed = {
        n for (n, p), q in zip(plain.named_parameters(), mended.parameters(), strict=True)
        if not torch.equal(p, q)
    }  # fmt: skip
    readers = ("o_proj", "down_proj", "c_proj", "out_proj", "fc2")
    assert all(any(reader in n for reader in readers) for n in changed)
    if part == 1.0:
        assert not changed


def test_a_repeated_channel_is_made_up_for() -> None:
    """Two channels with equal inputs: one goes, and the other takes its weight, almost exactly."""
    model: Any = build("llama")
    group = next(g for g in fxmem.coupling(model).groups if g.kind == "mlp_channels")
    mlp = model.get_submodule(group.name.rpartition(".")[0])
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[1] = projection.weight[0]
    units = fxmem.coupling(model)
    kept = {group.name: tuple(i for i in range(group.size) if i != 1)}
    masks, rows = fxmem.Masks.from_kept(units, kept), 24
    plain: Any = fxmem.materialize(model, masks, units)
    mended = solved(model, units, masks, rows)
    ids = data(5)[0]["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        off, near = ((m(input_ids=ids).logits - want).norm() for m in (plain, mended))
    assert float(near) < 0.1 * float(off)


def test_a_bias_takes_the_mean_of_what_is_gone() -> None:
    """All inputs constant: the bias alone repairs the layer exactly."""
    model: Any = build("opt")
    units = fxmem.coupling(model)
    layer = model.model.decoder.layers[-1]
    with torch.no_grad():
        layer.fc1.weight.zero_()
    group = next(g for g in units.groups if g.kind == "mlp_channels" and g.layer == 1)
    masks = fxmem.Masks.from_kept(units, {group.name: tuple(range(0, group.size, 2))})
    mended = solved(model, units, masks, 4)
    ids = data(5)[0]["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        plain = fxmem.materialize(model, masks, units)(input_ids=ids).logits
        assert float((mended(input_ids=ids).logits - want).norm()) < 1e-6 * float(want.norm())
        assert float((plain - want).norm()) > 1e-2 * float(want.norm())


@pytest.mark.parametrize(
    ("losses", "step"),
    [((4.0, 1.0, 4.0), 0.5), ((1.0, 2.0, 5.0), 0.25), ((5.0, 2.0, 1.0), 1.0), ((1, 1, 1), 0.25)],
)
def test_the_step_is_where_a_parabola_is_lowest(
    losses: tuple[float, float, float], step: float
) -> None:
    assert mend._lowest(*losses) == pytest.approx(step, abs=1e-12)


def test_unusable_batches_are_named() -> None:
    model, units = cases("llama")
    masks = drawn(units, 0.5, 0)
    odd = [*data(0, 1), {k: v[:, :5] for k, v in data(0, 1)[0].items()}]
    one = [{k: v[:1] for k, v in data(0, 1)[0].items()}]
    unlabelled = [{"input_ids": b["input_ids"]} for b in data(0)]
    for rows, message in (
        ([], "without batches"), (odd, "different shapes"), (one, "one row"),
        (unlabelled, "labels"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=message):
            fxmem.materialize(model, masks, units, repair=rows)


def test_a_repaired_model_is_saved_as_it_is(tmp_path: Any) -> None:
    model, units = cases("gpt2")
    mended: Any = fxmem.materialize(model, drawn(units, 0.5, 1), units, repair=data(0))
    fxmem.save_pretrained(mended, tmp_path)
    again: Any = fxmem.from_pretrained(tmp_path)
    ids = data(5)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, mended(input_ids=ids).logits)
