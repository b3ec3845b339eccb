"""fxmem: make LLM training fit in memory by compiling the training step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

if importlib.util.find_spec("fxmem.passes") is None:
    # a bare clone: passes/ and kernels/ stand beside this folder
    __path__.append(str(Path(__file__).parent.parent))

from fxmem.api import backend, restore, transform
from fxmem.errors import FxmemError, MaskError
from fxmem.explain import Report, explain
from fxmem.plan import Plan, Stream
from fxmem.prune.instances import instantiate
from fxmem.prune.masks import Masks
from fxmem.prune.materialize import coupling, materialize
from fxmem.prune.options import Prune
from fxmem.prune.oracle import masked
from fxmem.prune.saving import from_pretrained, save_pretrained
from fxmem.prune.search import score, search
from fxmem.prune.units import Coupling, UnitGroup

__version__ = "0.1.0"
__all__ = [
    "Coupling", "FxmemError", "MaskError", "Masks", "Plan", "Prune", "Report", "Stream",
    "UnitGroup", "backend", "coupling", "explain", "from_pretrained", "instantiate", "masked",
    "materialize", "restore", "save_pretrained", "score", "search", "transform",
]  # fmt: skip
