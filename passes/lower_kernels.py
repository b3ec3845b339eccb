"""Lower kernels: subgraphs of a chunk body become calls of the kernels that compute them.

Legal where the kernel's axis signature unifies with the subgraph's, the dtype is one of the
kernel's and Triton runs on the device. Every match is written down with the reason where it was not
replaced. ``off`` names kernels that are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem.kernels import token_nll
from fxmem.kernels.registry import find, lookup
from fxmem.passes import match_calls as around
from fxmem.passes import match_norms as norms
from fxmem.passes import match_pointwise as within
from fxmem.passes.match_lm_head import linear_nll
from fxmem.passes.match_pointwise import Match
from fxmem.rewriting.aliases import has_effect
from fxmem.rewriting.patterns import info
from fxmem.rewriting.pipeline import Edit, LocalPass

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


@dataclass(frozen=True, slots=True)
class LowerKernels(LocalPass[fx.Graph]):
    """The pass for bodies that run on ``device``; ``found`` receives every match."""

    device: torch.device
    found: list[Found]
    off: frozenset[str] = frozenset()
    name: str = "lower_kernels"

    def edits(self, graph: fx.Graph) -> Iterator[Edit]:
        known: set[fx.Node] = set()
        for matcher in MATCHERS:
            for node in list(graph.nodes):
                if node.op != "call_function" or node._erased:
                    continue
                match = matcher(node)
                if match is None:
                    continue
                if match.at is not None:
                    known.add(match.at)
                reason = self._refuses(match)
                kind = str(match.dtype).removeprefix("torch.")
                if reason:
                    self.found.append(Found(match.kernel, kind, reason))
                    continue
                done: list[Found] = []

                def edit(match: Match = match, kind: str = kind, done: list[Found] = done) -> None:
                    match.replace()
                    graph.eliminate_dead_code(has_effect)
                    done.append(Found(match.kernel, kind, ""))

                yield edit
                self.found.extend(done or [Found(match.kernel, kind, "out of fuel")])
        graph.lint()
        self.found.extend(f for n in graph.nodes if n not in known and (f := _unmatched(n)))

    def _refuses(self, match: Match) -> str:
        """Why not."""
        if match.kernel in self.off:
            return "switched off"
        if not any(k.name == match.kernel for k in lookup(match.op, match.signature)):
            return "axis signatures do not unify"
        available = find(match.kernel).available(self.device, match.dtype)
        return "" if available else available.reason


def _unmatched(node: fx.Node) -> Found | None:
    """Why a node that a kernel is for is part of no match."""
    name = str(node.target) if isinstance(node.target, _compat.OpOverload) else node.target
    if node.op != "call_function" or name not in _ALONE:
        return None
    kernel, reason = _ALONE[name]
    kind = next((i for a in (node, *node.all_input_nodes) if (i := info(a)) is not None), None)
    return Found(kernel, "" if kind is None else str(kind.dtype).removeprefix("torch."), reason)


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
