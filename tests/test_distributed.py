"""DistributedDataParallel around a streamed model: two processes equal one on both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from data_parallel import inputs, run_rank
from double import everything_in_double, largest_difference


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_ranks_equal_one_process(tmp_path: Path, name: str) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"), str(tmp_path), name), nprocs=2)
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
