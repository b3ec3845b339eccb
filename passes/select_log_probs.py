"""Select log-probabilities: ``log_softmax`` of which ``gather`` reads one entry per row.

Preference and policy objectives take the log-probabilities of the whole vocabulary and pick one of
them per token. Autograd then fills a tensor of the logits' size with zeros, scatters one number per
row into it and runs a softmax backward over it. The token loss needs neither: its gradient is
``(softmax - onehot) * grad``, in place of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxmem.frontend import functional_writes as functional
from fxmem.frontend.capture import value_of
from fxmem.rewriting.pipeline import Edit, LocalPass


@dataclass(frozen=True, slots=True)
class SelectLogProbs(LocalPass[fx.GraphModule]):
    """Rewrite ``log_softmax(x, -1).gather(-1, index)``, whatever way it is spelled."""

    name: str = "select_log_probs"

    def edits(self, gm: fx.GraphModule) -> Iterator[Edit]:
        for node in list(gm.graph.nodes):
            logits = _log_softmax(node)
            picks = [_pick(user, node) for user in node.users] if logits else []
            if logits is not None and picks and None not in picks:
                yield partial(_select, node, logits, picks)


def _select(node: fx.Node, logits: fx.Node, picks: list[fx.Node | None]) -> None:
    for user, index in zip(list(node.users), picks, strict=True):
        args = (logits, index, value_of(node).dtype)
        with node.graph.inserting_before(user):
            new = node.graph.call_function(functional.selected_log_probs, args)
        new.meta.update(user.meta)
        user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def decide_sizes(gm: fx.GraphModule) -> None:
    """Guard the comparisons of sizes that :class:`SelectLogProbs` makes: before any pass runs,
    since a guard rewrites recorded values.
    """
    for node in gm.graph.nodes:
        if _log_softmax(node):
            for user in node.users:
                _pick(user, node)


def _log_softmax(node: fx.Node) -> fx.Node | None:
    """The logits of a ``log_softmax`` over their last dimension, in float32 or wider: narrower
    types round the sum of a whole row, which log-probabilities then share.
    """
    call = _arguments(node, "log_softmax", ("input", "dim", "_stacklevel", "dtype"))
    value = value_of(node)
    if call is None or not isinstance(value, Tensor) or value.dtype.itemsize < 4:
        return None
    logits, dim = call["input"], call.get("dim")
    if not isinstance(logits, fx.Node) or not value.dim() or dim not in (-1, value.dim() - 1):
        return None
    return logits


def _pick(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """The index of a ``gather`` that reads one entry of every row of ``source``."""
    call = _arguments(node, "gather", ("input", "dim", "index"))
    if call is None or set(call) != {"input", "dim", "index"} or call["input"] is not source:
        return None
    index, shape = call["index"], value_of(source).shape
    if not isinstance(index, fx.Node) or call["dim"] not in (-1, len(shape) - 1):
        return None
    picked = value_of(index).shape
    alike = len(picked) == len(shape) and picked[-1] == 1
    rows = zip(picked[:-1], shape[:-1], strict=False)
    return index if alike and all(a == b for a, b in rows) else None


def _arguments(node: fx.Node, name: str, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Arguments by name of a call of this function or method of torch, else None."""
    if node.op == "call_method":
        if node.target != name:
            return None
        names = tuple(n for n in names if not n.startswith("_"))
    elif node.op != "call_function" or node.target not in (
        getattr(torch, name), getattr(torch.nn.functional, name, None),
    ):  # fmt: skip
        return None
    elif node.target is getattr(torch, name):
        names = tuple(n for n in names if not n.startswith("_"))
    if len(node.args) > len(names):
        return None
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
