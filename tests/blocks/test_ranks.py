"""Blocks inside DistributedDataParallel: two ranks equal one process on both batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from ranks import on_ranks
from wrapped_blocks import KINDS, OPTIONS, of_some_ranks, refusals, run, runs

QUICK = [("last", "unused", True)]
REST = [(k, o, i % 4 < 2) for i, (k, o) in enumerate(itertools.product(KINDS, OPTIONS))
        if (i + i // len(OPTIONS)) % 2]  # fmt: skip
"""Every kind with two options, transformed after the wrapper with one and before with the other."""


@pytest.mark.parametrize(
    "asked",
    [
        QUICK,
        *(pytest.param(REST[i::3], marks=pytest.mark.distributed) for i in range(3)),
    ],
    ids=["quick", "first", "second", "third"],
)
def test_two_ranks_equal_one_process(asked: list[tuple[str, str, bool]]) -> None:
    """Unequal lengths, visits of one step, ``no_sync``, clipping after the backward, evaluation."""
    alone = {kind: run(0, kind) for kind, _, _ in asked}
    for case, *ranks in zip(asked, *on_ranks(runs, asked), strict=True):
        for a, b, c in zip(*ranks, alone[case[0]], strict=True):
            assert torch.equal(a, b), case
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)


@pytest.mark.distributed
def test_the_ranks_are_those_of_the_wrapper() -> None:
    first, nothing, second = on_ranks(of_some_ranks, count=3)
    assert not nothing
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.distributed
def test_what_only_buckets_can_do_is_refused_by_name() -> None:
    for found in on_ranks(refusals):
        assert "register_comm_hook" in found["hook"]
        assert "set_comm_hook_name" in found["late hook"]
        assert "join()" in found["join"]
        assert "wrap the model anew" in found["restored"]
        assert "Around" in found["part"]
