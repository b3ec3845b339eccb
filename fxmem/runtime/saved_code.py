"""The part of a region's code that another process can take over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxmem.frontend.joint import Joint
from fxmem.program.steps import Program


@dataclass(slots=True)
class Saved:
    """The trace, the first level of what the backward may be given (``held``), and the programs
    before they are lowered. ``assumed``: comparisons of sizes that the trace decided.
    """

    joint: Joint
    held: list[fx.Node]
    programs: dict[tuple[str, bool], Program] = field(default_factory=dict)
    assumed: list[Any] = field(default_factory=list)


__all__ = ["Saved"]
