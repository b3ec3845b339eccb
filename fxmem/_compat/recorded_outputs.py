"""Hidden states, attentions and router logits, which transformers records by hooks that it installs
in the first call that asks for them, under a lock that Dynamo cannot enter.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["install"]


def install(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Install the hooks now, on the models inside ``model`` that the call makes record; whether
    there are any.
    """
    library = sys.modules.get("transformers.utils.output_capturing")
    ready = getattr(library, "maybe_install_capturing_hooks", None)
    found = False
    if ready is None:
        return found
    for module in model.modules():
        records = library._CAN_RECORD_REGISTRY.get(module)  # type: ignore[union-attr]
        config = getattr(module, "config", None)
        if records and any(_asked(f"output_{kind}", kwargs, config) for kind in records):
            if not _ready_inside(module):
                ready(module)
            found = True
    return found


def _ready_inside(module: nn.Module) -> bool:
    """Whether a call before has installed them on a model inside: they would be there twice."""
    name = "_output_capturing_hooks_installed"
    return any(getattr(m, name, False) for m in module.modules() if m is not module)


def _asked(name: str, kwargs: Mapping[str, Any], config: Any) -> bool:
    # cross-attentions are recorded with attentions
    names = {name, "output_attentions"} if name.endswith("attentions") else {name}
    return any(bool(kwargs.get(n)) or bool(getattr(config, n, False)) for n in names)
