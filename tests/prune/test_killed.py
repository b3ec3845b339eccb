"""A search that is killed while it writes loses the running step and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch
from search_killed import OPTIONS, batches, model

import fxmem

HELPERS = Path(__file__).resolve().parent.parent / "helpers"


def test_a_search_goes_on_after_kills_during_writes(tmp_path: Path) -> None:
    file = tmp_path / "search.pt"
    for where, step in (("write", 2), ("sync", 4), ("replace", 5)):
        done = subprocess.run(
            [sys.executable, HELPERS / "search_killed.py", file, where, str(step)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert torch.load(file, weights_only=True)["loop"]["done"] == step - 1
    seen: list[int] = []
    masks = fxmem.search(
        model(), batches(), OPTIONS, checkpoint=file, callback=lambda s: seen.append(s.step)
    )
    assert seen == [5, 6]
    assert masks == fxmem.search(model(), batches(), OPTIONS)
