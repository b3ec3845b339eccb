"""fxmem: make LLM training fit in memory by compiling the training step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

if importlib.util.find_spec("fxmem.passes") is None:
    # a bare clone: passes/ and kernels/ stand beside this folder
    __path__.append(str(Path(__file__).parent.parent))

from fxmem.api import backend, merge_low_rank, restore, transform
from fxmem.blocks.optimizer import BlockAdamW
from fxmem.errors import (
    BackwardTwiceError,
    BudgetError,
    CaptureError,
    DivergedError,
    DoubleBackwardError,
    DroppedLogitsError,
    FxmemError,
    FxmemWarning,
    MaskError,
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
from fxmem.plan_blocks import SGD, Blocks, LowRank, SignSGD
from fxmem.prune.instances import instantiate
from fxmem.prune.masks import Masks
from fxmem.prune.materialize import coupling, materialize
from fxmem.prune.options import Prune
from fxmem.prune.oracle import masked
from fxmem.prune.saving import from_pretrained, save_pretrained
from fxmem.prune.search import score, search
from fxmem.prune.sparse import sparse_backward
from fxmem.prune.units import Coupling, UnitGroup

__version__ = "0.1.0"
__all__ = [
    "BackwardTwiceError",
    "BudgetError",
    "DivergedError",
    "BlockAdamW",
    "Blocks",
    "CaptureError",
    "Coupling",
    "DoubleBackwardError",
    "DroppedLogitsError",
    "FxmemError",
    "FxmemWarning",
    "LowRank",
    "MaskError",
    "Masks",
    "ModifiedParameterError",
    "MutationError",
    "NotTransformedError",
    "Plan",
    "PlanError",
    "Prune",
    "Report",
    "RoleError",
    "SGD",
    "SignSGD",
    "Stream",
    "UnitGroup",
    "UnsupportedOpError",
    "VerificationError",
    "backend",
    "coupling",
    "explain",
    "from_pretrained",
    "instantiate",
    "masked",
    "materialize",
    "merge_low_rank",
    "restore",
    "save_pretrained",
    "score",
    "search",
    "sparse_backward",
    "transform",
]
