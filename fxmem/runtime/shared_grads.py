"""Gradients of parameters that several regions of a call use (tied weights).

The first region that uses the parameter, its *owner*, is the last to run in a backward: autograd
runs nodes in the opposite order of their making. The others hand their part on to it, so that one
tensor holds the sum. Parts belong to one autograd pass, and a region hands its part on only where
the owner runs in that pass: ``torch.autograd.grad`` and ``backward(inputs=...)`` run some nodes
only.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxmem._compat import graph as _compat

Shared = Mapping[int, tuple[Any, bool]]
"""Input position -> (parameter, whether this region is its owner)."""


@dataclass(slots=True)
class SharedGrads:
    """What the regions of one call share. ``owners``: the autograd node of each owner, which this
    must not keep alive; ``parts``: by autograd pass and parameter."""

    owners: dict[Any, weakref.ref[Any]] = field(default_factory=dict)
    parts: dict[tuple[int, Any], Tensor] = field(default_factory=dict)

    def own(self, shared: Shared, node: Any) -> None:
        """``node`` is the autograd node of a region with these parameters."""
        self.owners |= {key: weakref.ref(node) for key, owner in shared.values() if owner}

    def take(self, shared: Shared) -> dict[int, Tensor]:
        """What other regions handed on in this pass, by input position of the owner."""
        keys = {i: (_compat.backward_id(), key) for i, (key, owner) in shared.items() if owner}
        return {i: self.parts.pop(key) for i, key in keys.items() if key in self.parts}

    def hand_on(self, shared: Shared, grads: list[Tensor | None]) -> None:
        """Take out of ``grads``, which have storages of their own, what the owner will return."""
        for i, (key, owner) in shared.items():
            grad, node = grads[i], self.owners.get(key, lambda: None)()
            if owner or grad is None or node is None or not _compat.runs_in_this_pass(node):
                continue
            at = _compat.backward_id(), key
            self.parts[at] = grad if at not in self.parts else self.parts[at].add_(grad)
            grads[i] = None
