"""What a resumed search asks of a checkpoint, whatever its estimator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxmem.errors import BudgetError


def check_same_search(state: Mapping[str, Any], options: Any, units: int) -> None:
    """
    Raises:
        BudgetError: the state is of a search with other options, or of another number of units.
    """
    if state["options"] != repr(options) or len(state["s"]) != units:
        raise BudgetError(
            "the checkpoint is of a search with other options or units",
            advice="resume with the same options and model, or delete the checkpoint",
        )


__all__ = ["check_same_search"]
