"""``accelerate launch`` and the Trainer with FSDP2: plain and streamed end at the same weights,
blocks at those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerated import alone
from double import everything_in_double, largest_difference
from sources import ROOT
from trainer_fsdp2 import run, trained


@pytest.mark.distributed
def test_a_launch_with_fsdp2(tmp_path: Path) -> None:
    helpers = ROOT / "tests/helpers"
    options = {
        "num_processes": "2", "num_machines": "1", "main_process_port": "0",
        "mixed_precision": "no", "dynamo_backend": "no", "fsdp_version": "2",
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_cpu_ram_efficient_loading": "false",
    }  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", *given]
    paths = [str(helpers), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*launch, str(helpers / "accelerated.py"), str(tmp_path)], capture_output=True, text=True,
        timeout=600, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    with everything_in_double():
        want = alone()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert largest_difference(found["streamed"], found["plain"])[0] < 1e-10
        assert largest_difference(found["blocks"], want)[0] < 1e-10


@pytest.mark.distributed
def test_the_trainer_with_fsdp2_and_blocks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    with everything_in_double():
        for policy in ranks[0]:
            want = trained(str(tmp_path), 1, policy)
            for found in ranks:
                assert largest_difference(found[policy], want)[0] < 1e-10, policy
