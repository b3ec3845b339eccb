"""Free factories: ``x.new_zeros(shape)`` becomes ``zeros(shape)``, so that a constant depends on no
value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxmem.frontend.capture import value_of
from fxmem.frontend.joint import Joint
from fxmem.rewriting.pipeline import Edit, LocalPass

_STRIDED = "aten.new_empty_strided.default"
_FORMS: dict[str, Any] = {
    "aten.new_zeros.default": torch.ops.aten.zeros.default,
    "aten.new_ones.default": torch.ops.aten.ones.default,
    "aten.new_full.default": torch.ops.aten.full.default,
    "aten.new_empty.default": torch.ops.aten.zeros.default,
    _STRIDED: torch.ops.aten.zeros.default,
}


@dataclass(frozen=True, slots=True)
class FreeFactories(LocalPass[Joint]):
    """Rewrite ``new_*`` calls with the source tensor's dtype and device."""

    name: str = "free_factories"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        for node in joint.graph.nodes:
            if str(node.target) in _FORMS:
                yield partial(_free, node)


def _free(node: fx.Node) -> None:
    value = value_of(node)
    if str(node.target) == _STRIDED:  # no value is read before it is written, in any order
        node.args = node.args[:2]
    node.target = _FORMS[str(node.target)]
    node.args = tuple(node.args[1:])
    node.kwargs = {"dtype": value.dtype, "device": value.device}
