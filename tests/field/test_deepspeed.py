"""DeepSpeed on two ranks: ``DS_BUILD_OPS=0 pip install deepspeed`` is enough on a CPU."""

from __future__ import annotations

import pytest
from double import largest_difference
from ranks import on_ranks
from zero import refused, steps

pytestmark = pytest.mark.field


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_stages_that_keep_parameters_whole_stream() -> None:
    (first, second) = on_ranks(steps, double=False)
    for stage, (plain, *streamed) in first.items():
        for weights, others in zip(streamed, second[stage][1:], strict=True):
            assert largest_difference(weights, others)[0] == 0, stage
            assert largest_difference(weights, plain)[0] < 1e-6, stage


def test_the_stage_that_takes_them_apart_and_blocks_are_refused_by_name() -> None:
    for messages in on_ranks(refused, double=False):
        assert len(messages) == 3
        assert all("ZeRO" in m and "fully_shard" in m for m in messages)
