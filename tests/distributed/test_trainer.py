"""Transformers' Trainer on two ranks, which wraps the model by DistributedDataParallel."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from double import largest_difference
from trainer_ranks import PLANS, run_rank, train

pytestmark = pytest.mark.distributed


def test_it_trains_evaluates_saves_and_goes_on(tmp_path: Path) -> None:
    """Two ranks equal one process on their rows; a run that was resumed equals one that was not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for kind in PLANS:
        (one, resumed), (two, _) = first[kind], second[kind]
        assert all(torch.equal(one[n], two[n]) for n in one), kind
        assert largest_difference(resumed, one)[0] < 1e-12, kind
    assert largest_difference(first["stream"][0], first["plain"][0])[0] < 1e-10
    for kind in ("blocks", "accumulated"):
        alone = train(kind, tmp_path / "alone")
        assert largest_difference(first[kind][0], alone)[0] < 1e-10, kind
