"""DistributedDataParallel around a streamed model: two processes equal one on both batches."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from data_parallel import hook_runs, inputs, outside, run_rank, run_trainer, writing
from double import everything_in_double, largest_difference
from ranks import on_ranks


@pytest.mark.parametrize(
    ("name", "options", "order", "stream"),
    [
        ("llama", {"gradient_as_bucket_view": True}, "after", {}),
        *(
            pytest.param(*given, marks=pytest.mark.distributed)
            for given in (
                ("mixtral", {}, "before", {}),
                ("llama", {"find_unused_parameters": True}, "before", {}),
                ("llama", {"static_graph": True}, "after", {}),
                ("llama", {}, "before", {"memory": "1GB", "offload": "disk"}),
                ("qwen2", {}, "after", {"offload": "disk"}),
            )
        ),
    ],
)
def test_two_ranks_equal_one_process(
    tmp_path: Path, name: str, options: dict[str, bool], order: str, stream: dict[str, str]
) -> None:
    given = (str(tmp_path / "store"), str(tmp_path), name, options, order, stream)
    mp.spawn(run_rank, given, nprocs=2)
    with everything_in_double():
        plain = tiny.model(name).double()
        for rank in (0, 1):
            plain(**inputs(rank)).loss.backward()
    (first, bodies), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert bodies > 0 and others > 0
    for parameter in first:
        assert torch.equal(first[parameter], second[parameter]), parameter
    # Two backwards of averages over two ranks: the sum over the batches.
    want = {n: p.grad for n, p in plain.named_parameters()}
    assert largest_difference(first, want)[0] < 1e-10


def test_the_trainer_on_two_ranks_equals_plain(tmp_path: Path) -> None:
    """It asks DistributedDataParallel for unused parameters, which copies every output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_trainer, (port, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        plain, streamed = torch.load(tmp_path / f"{rank}.pt")
        assert largest_difference(streamed, plain)[0] < 1e-10


@pytest.mark.distributed
def test_hooks_that_compress_what_is_sent() -> None:
    (first, one), (second, two) = on_ranks(hook_runs)
    assert first == second
    for name, (difference, compressed) in first.items():
        assert difference < 1e-10, name
        assert compressed == (name in ("bf16", "fp16")), name
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.distributed
def test_buffers_that_a_forward_writes_and_models_in_parts() -> None:
    """DistributedDataParallel sends the buffers of the first rank before each call."""
    for found in on_ranks(writing):
        for kind, (difference, bodies) in found.items():
            assert difference < 1e-10, kind
            assert bodies > 0, kind


@pytest.mark.distributed
def test_losses_outside_of_what_it_copies() -> None:
    """Also of tied weights, and where parameters get no gradient."""
    for found in on_ranks(outside):
        for name, (difference, bodies) in found.items():
            assert difference < 1e-10, name
            assert bodies > 0, name
