"""What the demo is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fxmem.demo.models import SMOLLM2
from fxmem.demo.worker import SETUPS
from fxmem.optional import UsageError

LEARNING_RATES = {"sgd": 0.02, "adamw": 2e-5}


@dataclass(frozen=True)
class Demo:
    """What to run.

    Attributes:
        model: "smollm2", "tiny", a folder or a hub id.
        length: tokens of the document.
        steps: training steps, each on the whole document.
        setups: names from :data:`fxmem.demo.worker.SETUPS`, in order.
        threads: of torch; None leaves torch's own choice.
        optimizer: "sgd" or "adamw".
        lr: learning rate; None takes the one that suits the optimizer.
        chunk: tokens per chunk in fxmem, or "auto".
        out: folder for table and pictures.
        wheel: an existing copy of the SmolLM2 wheel.
        exact: compare gradients with a float64 step of plain autograd, since every float32 setup
            has errors of its own; otherwise, and where that step fails, with the first setup.
    """

    model: str = SMOLLM2
    length: int = 2048
    steps: int = 3
    setups: tuple[str, ...] = tuple(SETUPS)
    threads: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    chunk: int | Literal["auto"] = "auto"
    out: Path = Path("fxmem-demo")
    wheel: Path | None = None
    exact: bool = True

    def check(self) -> None:
        """Refuse impossible values before anything is loaded.

        Raises:
            UsageError: names the field and the values that are possible.
        """
        unknown = [name for name in self.setups if name not in SETUPS]
        if unknown or not self.setups:
            known = ", ".join(SETUPS)
            raise UsageError(f"unknown setups {unknown}", advice=f"choose from {known}")
        numbers = {"length": (self.length, 2), "steps": (self.steps, 1)}
        numbers["threads"] = (1 if self.threads is None else self.threads, 1)
        if isinstance(self.chunk, int):
            numbers["chunk"] = (self.chunk, 1)
        for field, (value, least) in numbers.items():
            if value < least:
                raise UsageError(f"{field} is {value}", advice=f"use at least {least}")
        if self.optimizer not in LEARNING_RATES:
            raise UsageError(f"unknown optimizer {self.optimizer!r}", advice="sgd or adamw")
