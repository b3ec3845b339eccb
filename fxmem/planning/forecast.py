"""What fits: the answer of :func:`fxmem.plan_for`, as data, text, picture and page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxmem.planning.answer import Answer
from fxmem.planning.page import write_page
from fxmem.planning.picture import write_picture
from fxmem.planning.text import text


@dataclass(frozen=True, slots=True)
class Forecast(Answer):
    """What training steps of a model take on a device.

    Attributes:
        model: its name.
        device: where it trains.
        memory: bytes that a step may take there, weights and optimizer included.
        length: tokens per sequence of the steps that are compared; where none was asked for, the
            longest of the chosen row.
        batch: sequences per step.
        dtype: of the weights.
        rows: one per way to train.
        chosen: the row that `plan` is for.
        plan: for :func:`fxmem.transform`; keeps within the memory.
        parts: bytes at the peak of the chosen step, by :data:`PARTS`.
        seconds: of the chosen step, about: operations and bytes over the device's rates.
        keeps: what the layers of the chosen step do with what their forward makes, one line each.
        notes: what else there is to know.
        traffic: between ranks that share the parameters; None where there is one.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without the moments of the step."""
        found: dict[str, Any] = {
            str(k): getattr(self, k) for k in self.__match_args__ if k != "steps"
        }
        texts = {k: list(found[k]) for k in ("keeps", "notes")}
        rows = [asdict(r) for r in self.rows]
        plan = self.plan.to_toml()
        traffic = None if self.traffic is None else asdict(self.traffic)
        own = {"rows": rows, "chosen": asdict(self.chosen), "plan": plan, "traffic": traffic}
        return {**found, **texts, **own}

    def plot(self, path: str | Path) -> None:
        """Write a picture of the bytes over the chosen step, by part; PNG or SVG by its name.

        Raises:
            MissingExtraError: matplotlib is not installed.
            FileError: it cannot be written.
        """
        write_picture(self, Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write one HTML page with tables and picture, which needs nothing else.

        Raises:
            MissingExtraError: matplotlib is not installed.
            FileError: it cannot be written.
        """
        write_page(self, Path(path))

    def __str__(self) -> str:
        return text(self)
