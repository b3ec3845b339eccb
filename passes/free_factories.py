"""Free factories: ``x.new_zeros(shape)`` becomes ``zeros(shape)``, so that a constant depends on no
value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxmem.capture import value_of
from fxmem.joint import Joint

_FORMS: dict[str, Any] = {
    "aten.new_zeros.default": torch.ops.aten.zeros.default,
    "aten.new_ones.default": torch.ops.aten.ones.default,
    "aten.new_full.default": torch.ops.aten.full.default,
    "aten.new_empty.default": torch.ops.aten.zeros.default,
}


@dataclass(frozen=True, slots=True)
class FreeFactories:
    """Rewrite ``new_*`` calls with the source tensor's dtype and device."""

    name: str = "free_factories"

    def run(self, joint: Joint) -> Joint:
        joint = joint.copy()
        for node in joint.graph.nodes:
            form = _FORMS.get(str(node.target))
            if form is None:
                continue
            value = value_of(node)
            node.args = tuple(node.args[1:])
            node.kwargs = {"dtype": value.dtype, "device": value.device}
            node.target = form
        return joint
