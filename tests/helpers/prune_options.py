"""Options of the score estimator, all in one call."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fxmem.prune.units.options import Prune


def scored(**flat: Any) -> Prune:
    """``Prune(estimator="score")`` with the options of the estimator beside the others."""
    plain = {f.name: flat.pop(f.name) for f in fields(Prune) if f.name in flat}
    return Prune(**{"estimator": "score", "advanced": flat, **plain})
