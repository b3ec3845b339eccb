"""fxmem: make LLM training fit in memory by compiling the training step."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("fxmem.passes") is None:
    # a bare clone: passes/ and kernels/ stand beside this folder
    __path__.append(str(Path(__file__).parent.parent))

from fxmem import measure
from fxmem._compat import accelerate as _accelerate
from fxmem.api import backend, merge_low_rank, restore, transform
from fxmem.blocks.optimizer import BlockAdamW, BlockAdamWFactory
from fxmem.errors import (
    BackwardTwiceError,
    BudgetError,
    CaptureError,
    DivergedError,
    DoubleBackwardError,
    DroppedLogitsError,
    FileError,
    FxmemError,
    FxmemWarning,
    HookError,
    InternalError,
    LostRankError,
    MaskError,
    MemoryBudgetError,
    ModifiedParameterError,
    MutationError,
    NotTransformedError,
    OffloadError,
    PlanError,
    PruningFileError,
    RoleError,
    UnsupportedOpError,
    VerificationError,
)
from fxmem.plan.blocks import SGD, Blocks, LowRank, SignSGD
from fxmem.plan.plan import Plan, Stream
from fxmem.prune.recover import Recovery, recover
from fxmem.prune.search.search import score, search
from fxmem.prune.search.sparse_backward import sparse_backward
from fxmem.prune.shrink.masked import masked
from fxmem.prune.shrink.materialize import coupling, materialize
from fxmem.prune.shrink.saving import from_pretrained, save_pretrained
from fxmem.prune.shrink.submodels import instantiate
from fxmem.prune.units.masks import Masks
from fxmem.prune.units.options import Prune
from fxmem.prune.units.units import Coupling, UnitGroup
from fxmem.report.explain import explain
from fxmem.report.text import Report

if TYPE_CHECKING:
    from fxmem.compiler.bisection import bisect
    from fxmem.planning.forecast import Forecast
    from fxmem.planning.plan_for import plan_for
    from fxmem.trainer_callback import TrainerCallback

# Version 0.1.0 pickled plans, options and masks under these names of modules.
for _old, _new in (("plan_blocks", "plan.blocks"), ("prune.masks", "prune.units.masks"),
                   ("prune.options", "prune.units.options")):  # fmt: skip
    sys.modules.setdefault(f"fxmem.{_old}", sys.modules[f"fxmem.{_new}"])

_accelerate.register()
__version__ = "0.1.0"
__all__ = [
    "BackwardTwiceError",
    "BudgetError",
    "DivergedError",
    "MemoryBudgetError",
    "OffloadError",
    "BlockAdamW",
    "BlockAdamWFactory",
    "Blocks",
    "CaptureError",
    "Coupling",
    "DoubleBackwardError",
    "DroppedLogitsError",
    "FileError",
    "Forecast",
    "FxmemError",
    "FxmemWarning",
    "HookError",
    "InternalError",
    "LostRankError",
    "LowRank",
    "MaskError",
    "Masks",
    "ModifiedParameterError",
    "MutationError",
    "NotTransformedError",
    "Plan",
    "PlanError",
    "Prune",
    "PruningFileError",
    "Recovery",
    "Report",
    "RoleError",
    "SGD",
    "SignSGD",
    "Stream",
    "TrainerCallback",
    "UnitGroup",
    "UnsupportedOpError",
    "VerificationError",
    "backend",
    "bisect",
    "coupling",
    "explain",
    "from_pretrained",
    "instantiate",
    "masked",
    "materialize",
    "measure",
    "merge_low_rank",
    "plan_for",
    "recover",
    "restore",
    "save_pretrained",
    "score",
    "search",
    "sparse_backward",
    "transform",
]


_LATE = {
    "Forecast": "fxmem.planning.forecast", "TrainerCallback": "fxmem.trainer_callback",
    "bisect": "fxmem.compiler.bisection", "plan_for": "fxmem.planning.plan_for",
}  # fmt: skip
"""What is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
