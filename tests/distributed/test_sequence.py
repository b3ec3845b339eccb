"""``Stream(sequence=...)``: ranks that stream one sequence together equal one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from sequence_runs import (
    around,
    beside_data,
    collectives,
    diverged,
    exchanged,
    killed,
    models,
    odd,
    refused,
    ways,
)

from fxmem.distributed.sequence import Call, Group


def test_two_ranks_equal_one_process() -> None:
    for found in on_ranks(models, ["llama"], [23], 5):
        assert max(found.values()) < 1e-10, found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("count", "names", "lengths", "chunk"),
    [
        (3, ["qwen2", "gemma3", "mixtral"], [37, 23, 2], 4),
        (3, ["gpt2", "mistral-5", "qwen3_moe"], [64, 5], 64),
        (3, ["llama"], [17], 1),
        (4, ["llama"], [37, 11, 3], 4),
    ],
)
def test_more_ranks_equal_one_process(
    count: int, names: list[str], lengths: list[int], chunk: int
) -> None:
    for found in on_ranks(models, names, lengths, chunk, count=count):
        assert max(found.values()) < 1e-10, found


@pytest.mark.distributed
def test_what_no_decoder_does() -> None:
    for found in on_ranks(odd, [23, 9, 3], count=3):
        assert max(found.values()) < 1e-10, found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "names", [["smoothed", "answer", "states_too", "twice"], ["embedded", "hooked", "frozen"]]
)
def test_steps_of_other_kinds(names: list[str]) -> None:
    for found in on_ranks(ways, names):
        assert found.keys() == set(names)
        assert max(found.values()) < 1e-10, found


@pytest.mark.distributed
def test_dropout_evaluation_and_copies() -> None:
    for found in on_ranks(around):
        assert found.pop("sent") == 0  # ranks may evaluate different things
        assert max(found.values()) < 1e-10, found


@pytest.mark.distributed
def test_one_gather_and_one_reduction_per_layer_for_any_chunk() -> None:
    """And the ranks agree once. Sums of gradients of weights come besides."""
    for found in on_ranks(collectives):
        assert all(one == found[0] for one in found)
        assert found[0]["forward gathers"] == 2 + 1
        assert found[0]["backward gathers"] == 2
        assert found[0]["backward reductions"] == 2
        assert "forward reductions" not in found[0]


@pytest.mark.distributed
def test_bad_meshes_are_refused_before_anything_is_sent() -> None:
    words = ("mesh is None", "no dimension 'sp'", "names none", "knows no mesh")
    for *messages, sent in on_ranks(refused):
        assert sent == "0"
        for word, message in zip(words, messages, strict=True):
            assert word in message, message


@pytest.mark.distributed
def test_ranks_that_differ_are_told_so_and_go_on() -> None:
    words = ("sizes of inputs", "contents of inputs", "plans", "parameters that learn")
    for messages, after in on_ranks(diverged):
        for word, message in zip(words, messages, strict=True):
            assert message.startswith("DivergedError") and word in message, message
        assert after < 1e-10


@pytest.mark.distributed
def test_beside_data_parallelism_on_four_ranks() -> None:
    names = ["fsdp dp", "fsdp all", "ddp dp", "ddp all"]
    for found in on_ranks(beside_data, names, count=4):
        assert max(found.values()) < 1e-10, found


def alone(count: int, length: int, rank: int) -> Call:
    """One rank's view, with no process behind it."""
    return Call(Group("sp", None, rank, count, torch.device("cpu")), length)  # type: ignore[arg-type]


@given(st.integers(1, 9), st.integers(0, 300), st.integers(1, 99))
def test_every_row_is_in_one_chunk_of_one_rank(count: int, length: int, chunk: int) -> None:
    calls = [alone(count, length, rank) for rank in range(count)]
    seen = sorted(r for c in calls for lo, hi, _ in c.chunks(chunk) for r in range(lo, hi))
    assert seen == list(range(length))
    for call in calls:
        at = 0
        for lo, hi, first in call.chunks(chunk):
            assert first == at and 0 < hi - lo <= chunk
            at += hi - lo
        assert at == call.rows <= call.most
    assert max(c.rows for c in calls) - min(c.rows for c in calls) <= 2
    seen_keys = [sum(hi for lo, hi, _ in c.chunks(1)) for c in calls]
    assert max(seen_keys) - min(seen_keys) <= 2 * length + 2  # of length ** 2 / 2 / count each


@pytest.mark.distributed
def test_exchanges_equal_their_definitions() -> None:
    assert all(on_ranks(exchanged, count=3))


@pytest.mark.distributed
def test_a_rank_that_ends_is_an_error_on_the_others(tmp_path: Path) -> None:
    mp.spawn(killed, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "error").read_text().startswith("LostRankError: the ranks of 'sp'")
