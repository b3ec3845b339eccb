"""Lower kernels: subgraphs of a chunk body become calls of the kernels that compute them.

Legal where the kernel's axis signature unifies with the subgraph's, the dtype is one of the
kernel's and Triton runs on the device. Every match is written down with the reason where it was not
replaced. ``off`` names kernels that are not used, and ``fuel`` bounds how many matches are replaced
at all: by halving it a wrong result is brought down to one replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxmem import _compat
from fxmem.kernels import token_nll
from fxmem.kernels.registry import find, lookup
from fxmem.passes import kernel_call_matches as around
from fxmem.passes import kernel_matches as within
from fxmem.passes import norm_matches as norms
from fxmem.passes.head_matches import linear_nll
from fxmem.passes.kernel_matches import Match, info

MATCHERS: tuple[Callable[[fx.Node], Match | None], ...] = (
    linear_nll, norms.norm, norms.norm_backward, norms.layer_norm,
    norms.layer_norm_backward, within.gated_backward, within.gated, within.rotary, around.attend,
    around.attend_backward, around.weight_grad,
)  # fmt: skip
"""In order: what an earlier one has taken, a later one does not see."""


@dataclass(frozen=True, slots=True)
class Found:
    """One match: ``reason`` says why it was not lowered, and is empty where it was."""

    kernel: str
    dtype: str
    reason: str


@dataclass(slots=True)
class Record:
    """Every match so far, and what is left of the fuel (None: no bound)."""

    found: list[Found] = field(default_factory=list)
    fuel: int | None = None


@dataclass(frozen=True, slots=True)
class LowerKernels:
    """The pass for bodies that run on ``device``."""

    device: torch.device
    record: Record
    off: frozenset[str] = frozenset()
    name: str = "lower_kernels"

    def run(self, graph: fx.Graph) -> fx.Graph:
        new = fx.Graph()
        new.output(new.graph_copy(graph, {}))
        known: set[fx.Node] = set()
        for matcher in MATCHERS:
            for node in list(new.nodes):
                if node.op != "call_function" or node._erased:
                    continue
                match = matcher(node)
                if match is None:
                    continue
                if match.at is not None:
                    known.add(match.at)
                reason = self._refuses(match)
                dtype = str(match.dtype).removeprefix("torch.")
                self.record.found.append(Found(match.kernel, dtype, reason))
                if not reason:
                    match.replace()
                    new.eliminate_dead_code(_has_effects)
        new.lint()
        self.record.found += [f for n in new.nodes if n not in known and (f := _unmatched(n))]
        return new

    def _refuses(self, match: Match) -> str:
        """Why not; spends fuel where there is no reason."""
        if match.kernel in self.off:
            return "switched off"
        if not any(k.name == match.kernel for k in lookup(match.op, match.signature)):
            return "axis signatures do not unify"
        available = find(match.kernel).available(self.device, match.dtype)
        if not available:
            return available.reason
        if self.record.fuel is not None:
            if self.record.fuel <= 0:
                return "out of fuel"
            self.record.fuel -= 1
        return ""


def _unmatched(node: fx.Node) -> Found | None:
    """Why a node that a kernel is for is part of no match."""
    name = str(node.target) if isinstance(node.target, _compat.OpOverload) else node.target
    if node.op != "call_function" or name not in _ALONE:
        return None
    kernel, reason = _ALONE[name]
    kind = next((i for a in (node, *node.all_input_nodes) if (i := info(a)) is not None), None)
    return Found(kernel, "" if kind is None else str(kind.dtype).removeprefix("torch."), reason)


def _has_effects(node: fx.Node) -> bool:
    """Functions other than ATen operators may write."""
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and getattr(node.target, "__module__", "") in _WRITERS


_ALONE: dict[Any, tuple[str, str]] = {
    "aten._softmax.default": ("chunk_attention", "attention written out: its scores stand whole"),
    "aten.rsqrt.default": ("norm", "a norm of another form"),
    "aten.native_layer_norm.default": ("norm", "it normalises several dimensions"),
    "aten.silu.default": ("gated", "the activation gates nothing"),
    "aten.gelu.default": ("gated", "the activation gates nothing"),
    token_nll.forward_: (
        "linear_nll",
        "not the logits of one product, or read elsewhere",
    ),
}
"""Operator or function -> the kernel it could be part of, and what is in the way."""
_WRITERS = (
    "fxmem.runtime", "fxmem.kernels.attention", "fxmem.kernels.calls", "fxmem.kernels.weight_grad",
)  # fmt: skip
