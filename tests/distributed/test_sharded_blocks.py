"""Block training under ``fully_shard``: ranks equal one process on both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import uneven
from blocks_sharded import (
    CASES,
    KINDS,
    around,
    busy,
    evaluated,
    gradients_left,
    hybrid,
    ignored,
    kinds_of,
    models_of,
    options,
    poisoned,
    predicted,
    resume,
    rounded,
    save,
    saved_and_resumed,
    trained,
    trained_model,
)
from double import everything_in_double
from ranks import on_ranks
from torch import Tensor

QUICK = ["all", "accumulate"]


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("order", "kinds"),
    [
        ("before", QUICK),
        pytest.param("after", list(KINDS), marks=pytest.mark.distributed),
    ],
)
def test_two_ranks_equal_one_process(order: str, kinds: list[str]) -> None:
    """Of unequal lengths; visits of two steps."""
    first, second = on_ranks(kinds_of, order, kinds)
    for kind in kinds:
        assert all(map(torch.equal, first[kind], second[kind])), kind
        assert difference(first[kind], trained(0, 1, kind)) < 1e-10, kind


@pytest.mark.distributed
def test_models_by_the_ways_of_users() -> None:
    """Tied weights, experts; groups of several kinds. Every rank sends the same."""
    ranks = on_ranks(models_of, CASES)
    with everything_in_double():
        for case, (one, sent), (two, others) in zip(CASES, *ranks, strict=True):
            assert all(map(torch.equal, one, two)), case
            assert sent == others, case
            assert difference(one, trained_model(0, 1, *case)[0]) < 1e-10, case


@pytest.mark.distributed
def test_options_of_fully_shard() -> None:
    want = trained(0, 1, "per tensor")
    for found in on_ranks(options):
        for name, got in found.items():
            assert difference(got, want) < 1e-10, name


@pytest.mark.distributed
def test_replicas_of_shards_on_four_ranks() -> None:
    for found in on_ranks(hybrid, count=4):
        for kind, got in found.items():
            assert difference(got, trained(0, 1, kind)) < 1e-10, kind


@pytest.mark.distributed
def test_what_happens_around_a_step() -> None:
    """Accumulation without reduction, two forwards of one backward; evaluation, a failed call."""
    want = around(0, 1)
    for quiet, disturbed in on_ranks(busy):
        assert difference(quiet, want) < 1e-10
        assert difference(disturbed, quiet) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("order", ["before", "after"])
def test_calls_without_gradients_have_low_rank_terms(order: str) -> None:
    for found in on_ranks(evaluated, 2, order):
        without, learning = found[::2], found[1::2]
        assert difference(without, learning) < 1e-10


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Saved in the middle of a visit; bit for bit with the same number."""
    want = save(0, 1, f"{tmp_path}/one", 3)
    ranks = on_ranks(saved_and_resumed, str(tmp_path), 3, double=False)
    for whole, again, two, from_one in ranks:
        assert all(map(torch.equal, whole, again))
        assert difference(two, want) < 1e-10
        assert difference(from_one, want) < 1e-10
    assert difference(resume(0, 1, f"{tmp_path}/two", 3), want) < 1e-10


@pytest.mark.distributed
def test_ranks_agree_on_a_gradient_that_is_not_finite() -> None:
    """Which one of them alone has seen: what comes after it stays on all."""
    (moved, one), (others, two) = on_ranks(poisoned)
    assert moved == others
    assert "layers.2.up.weight" in moved
    assert not {"layers.1.up.weight", "layers.1.down.weight"} & moved
    # the root's group, with embedding and head, is reduced last
    assert all(n.startswith(("layers.1.", "layers.2.")) for n in moved)
    assert all(t.isfinite().all() for t in one)
    assert all(map(torch.equal, one, two))


@pytest.mark.distributed
def test_no_inactive_gradient_outlives_its_group() -> None:
    for left, sent in on_ranks(gradients_left):
        assert left == [0, 0, 0]
        assert sent["gathers"] == 1 + 2 * 3 and sent["reductions"] == 1 + 3


@pytest.mark.distributed
def test_rounding_does_not_depend_on_the_ranks() -> None:
    assert all(map(all, on_ranks(rounded, double=False)))


@pytest.mark.distributed
def test_a_parameter_that_nothing_reduces_is_refused() -> None:
    for message in on_ranks(ignored):
        assert "`head.weight` is not sharded" in message


@pytest.mark.distributed
def test_predicted_peaks() -> None:
    for found in on_ranks(predicted, double=False):
        for expected, measured in found:
            assert measured < 1.02 * expected < 1.05 * 1.02 * measured


@pytest.mark.distributed
@pytest.mark.parametrize("plan", uneven.PLANS)
def test_a_rank_with_one_token_or_without_labels(plan: str) -> None:
    """It streams nothing or makes its own loss, and sends what the others send."""
    (one, sent), (two, others) = on_ranks(uneven.on_a_rank, plan)
    assert sent == others
    assert all(map(torch.equal, one, two))
    with everything_in_double():
        assert difference(one, uneven.trained(0, 1, plan)[0]) < 1e-10
