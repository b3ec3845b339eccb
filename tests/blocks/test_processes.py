"""Block training that goes on in a new process, or runs on several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from blocks_cases import train
from blocks_worker import (
    JOINT,
    KINDS,
    UNEQUAL,
    joint,
    run_rank,
    run_unequal,
    start,
    unequal,
    values,
)
from sources import ROOT


def test_a_resume_in_a_new_process_is_bitwise(tmp_path: Path) -> None:
    """Stop in the middle of a visit; bfloat16 weights, stochastic rounding, random order, low-rank
    terms, delayed clipping, an always active norm and a cosine schedule.
    """
    first, last = 7, 14
    whole: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for kind in KINDS:
        net, opt, state, schedule = start(kind)
        train(net, opt, range(first), schedule)
        weights = {n: t.clone() for n, t in net.state_dict().items()}
        file = tmp_path / f"{kind}.pt"
        torch.save([weights, opt.state_dict(), schedule.state_dict()], file)
        saved[kind] = torch.load(file, weights_only=True)
        masters = [e["master"] for e in saved[kind][1]["state"].values() if "master" in e]
        assert masters and {m.dtype for m in masters} == {torch.float32}
        train(net, opt, range(first, last), schedule)
        whole[kind] = values(net, state)
    torch.save(saved, tmp_path / "saved.pt")
    worker = ROOT / "tests/helpers/blocks_worker.py"
    arguments = [tmp_path / "saved.pt", tmp_path / "ends.pt", first, last, torch.get_num_threads()]
    done = subprocess.run(
        [sys.executable, str(worker), *map(str, arguments)], capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ends = torch.load(tmp_path / "ends.pt")
    for kind in KINDS:
        assert all(torch.equal(a, b) for a, b in zip(whole[kind], ends[kind], strict=True)), kind


def test_two_processes_equal_one_on_the_joint_batch(tmp_path: Path) -> None:
    """Updates come after the average of the gradients: a sign or a clipped norm would tell."""
    mp.spawn(run_rank, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in JOINT:
        alone = joint(0, 1, kind)
        for a, b, c in zip(*(r[kind] for r in ranks), alone, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)
    assert "average=True" in torch.load(tmp_path / "error0.pt")


QUICK = ("clipped", "accumulate")


@pytest.mark.parametrize(
    "kinds",
    [QUICK, pytest.param(tuple(k for k in UNEQUAL if k not in QUICK), marks=pytest.mark.slow)],
    ids=["quick", "all"],
)
def test_ranks_of_unequal_lengths_reduce_in_one_order(
    tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    """One rank runs a region in one chunk and hands its gradients over inside, the other not."""
    mp.spawn(run_unequal, (2, str(tmp_path / "store"), str(tmp_path), kinds), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in kinds:
        for a, b, c in zip(*(r[kind] for r in ranks), unequal(0, 1, kind), strict=True):
            assert torch.equal(a, b), kind
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_trainer_checkpoint_resumes_in_a_new_process(tmp_path: Path) -> None:
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import blocks_with_trainer as example
from pathlib import Path
model, folder = example.build(), Path(sys.argv[2])
resume = str(folder / "checkpoint-3") if sys.argv[3] == "resume" else None
example.trainer(model, folder).train(resume_from_checkpoint=resume)
torch.save([p.detach() for p in model.parameters()], folder / (sys.argv[3] + ".pt"))
"""
    examples = str(ROOT / "examples")
    for what in ("whole", "resume"):
        done = subprocess.run(
            [sys.executable, "-c", code, examples, str(tmp_path), what], capture_output=True,
            text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (torch.load(tmp_path / f"{what}.pt") for what in ("whole", "resume"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
