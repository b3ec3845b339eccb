"""fxmem: make LLM training fit in memory by compiling the training step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

if importlib.util.find_spec("fxmem.passes") is None:
    # a bare clone: passes/ and kernels/ stand beside this folder
    __path__.append(str(Path(__file__).parent.parent))

from fxmem.api import backend, restore, transform
from fxmem.errors import (
    BackwardTwiceError,
    CaptureError,
    DoubleBackwardError,
    DroppedLogitsError,
    FxmemError,
    FxmemWarning,
    ModifiedParameterError,
    MutationError,
    NotTransformedError,
    PlanError,
    RoleError,
    UnsupportedOpError,
    VerificationError,
)
from fxmem.explain import Report, explain
from fxmem.plan import Plan, Stream

__version__ = "0.1.0"
__all__ = [
    "BackwardTwiceError",
    "CaptureError",
    "DoubleBackwardError",
    "DroppedLogitsError",
    "FxmemError",
    "FxmemWarning",
    "ModifiedParameterError",
    "MutationError",
    "NotTransformedError",
    "Plan",
    "PlanError",
    "Report",
    "RoleError",
    "Stream",
    "UnsupportedOpError",
    "VerificationError",
    "backend",
    "explain",
    "restore",
    "transform",
]
