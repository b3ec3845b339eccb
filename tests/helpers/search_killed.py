"""A search whose process is killed by its own hand in the middle of a write: file, where, step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import fxmem
from fxmem import files

OPTIONS = fxmem.Prune(keep=0.5, steps=6, init="magnitude")


def model() -> nn.Module:
    return tiny.model(initializer_range=0.3).eval()


def batches() -> list[dict[str, Tensor]]:
    ids = torch.arange(60).view(3, 2, 10) % tiny.VOCAB
    return [{"input_ids": x, "labels": x} for x in ids]


def dies(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(value: Any, file: Path) -> None:
    """As much of a checkpoint as a full page of it."""
    torch.serialization.save(value, file)
    os.truncate(file, file.stat().st_size // 2)
    dies()


def main(file: str, where: str, step: int) -> None:
    def callback(seen: Any) -> None:
        if seen.step != step - 1:
            return
        if where == "write":
            torch.save = half_written
        elif where == "sync":
            files._to_disk = dies
        else:
            Path.replace = dies  # type: ignore[assignment,method-assign]

    fxmem.search(model(), batches(), OPTIONS, checkpoint=file, callback=callback)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
