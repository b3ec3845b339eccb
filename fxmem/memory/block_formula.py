"""Bytes of block training by formula, from shapes alone; works on a model on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fxmem.blocks.partition import build, layer_lists
from fxmem.errors import PlanError
from fxmem.plan.blocks import SGD, Blocks, LowRank, SignSGD

STATE_VALUES = 4
"""Values in float32 per active parameter: master, gradient, two moments (BAdam, table 1)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes while the most expensive block is active.

    Attributes:
        weights: of all parameters.
        block: float32 master, gradient and moments of the largest block and what is always active.
        adapters: the same of low-rank terms.
        gradient: of inactive weights, at the moment when it and activations are largest together:
            in a layer that runs in one chunk the largest, alive until its update; in the head,
            whose gradient adds up over chunks, the sum in float32 and at the end its rounded copy.
        activations: at that moment: states between layers, and the buffers of a layer or the head.
        largest_block: its label.
    """

    weights: int
    block: int
    adapters: int
    gradient: int
    activations: int
    largest_block: str

    @property
    def total(self) -> int:
        return self.weights + self.block + self.adapters + self.gradient + self.activations

    def __str__(self) -> str:
        parts = ("weights", "block", "adapters", "gradient", "activations")
        rows = [f"{name:<12}{getattr(self, name) / 1e9:9.2f} GB" for name in parts]
        rows.append(
            f"{'total':<12}{self.total / 1e9:9.2f} GB, with block {self.largest_block} active"
        )
        return "\n".join(rows)


def estimate(
    model: nn.Module, plan: Blocks, tokens: int = 2048, *, chunk: int = 512,
    dtype: torch.dtype = torch.bfloat16,
) -> Estimate:  # fmt: skip
    """Peak bytes of a training step with streamed activations.

    The state between layers is kept once per layer; within a layer, every output of its matrices
    stands once at full length with its gradient (a chunk more does not matter), and the head's
    logits stand for one chunk in float32, three times (logits, probabilities, gradient).

    Args:
        model: may be on the meta device.
        tokens: batch size times sequence length.
        chunk: tokens per chunk of the head.
        dtype: precision of weights and states.

    Raises:
        PlanError: the plan does not fit the model, or numbers below 1.
    """
    if tokens < 1 or chunk < 1:
        raise PlanError(f"tokens {tokens}, chunk {chunk}", advice="give at least 1")
    parts = build(model, plan)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    sizes = {n: s.numel() for n, s in shapes.items()}
    blocks = {b.label: sum(sizes[n] for n in b.names) for b in parts.blocks}
    largest = max(blocks, key=lambda label: blocks[label])
    active = blocks[largest] + sum(sizes[n] for n in parts.always)
    learn = {n for b in parts.blocks for n in b.names} | set(parts.inactive)
    if not plan.update_head:
        learn -= set(parts.head)
    adapters, updated = 0, set[str]()
    if isinstance(plan.inactive, LowRank):
        tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding)
                  for p in m.parameters()}  # fmt: skip
        named = dict(model.named_parameters())
        adapters = sum(
            plan.inactive.rank * sum(shapes[n])
            for n in learn
            if len(shapes[n]) == 2 and id(named[n]) not in tables
        )
    elif isinstance(plan.inactive, (SGD, SignSGD)):
        # what is used before the layers is never deeper than the active block
        before = set(parts.inactive) - set(parts.head)
        updated = learn - before if plan.reach == "deeper" else learn
    gradient, activations = _moment(model, sizes, updated, tokens, chunk, dtype)
    return Estimate(
        weights=sum(sizes.values()) * dtype.itemsize,
        block=active * 4 * STATE_VALUES,
        adapters=adapters * 4 * STATE_VALUES,
        gradient=gradient,
        activations=activations,
        largest_block=largest,
    )


def _moment(
    model: nn.Module, sizes: dict[str, int], updated: set[str], tokens: int, chunk: int,
    dtype: torch.dtype,
) -> tuple[int, int]:  # fmt: skip
    """Gradients of inactive weights and activations, where they are largest together."""
    layers = [layer for _, children in layer_lists(model) for layer in children]
    # a norm is as wide as the state between layers; the widest of a layer counts
    width = max(
        (p.shape[0] for layer in layers for p in layer.parameters() if p.ndim == 1), default=0
    )
    widest = max(sum(p.shape[-2] for p in layer.parameters() if p.ndim >= 2) for layer in layers)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    named = dict(model.named_parameters())
    outside = [n for n, p in named.items() if p.ndim == 2 and id(p) not in inside]
    vocab = max((named[n].shape[0] for n in outside), default=0)
    between = len(layers) * tokens * width * dtype.itemsize
    within = 2 * tokens * widest * dtype.itemsize
    logits = 3 * min(chunk, tokens) * vocab * 4
    layer = max((sizes[n] for n in updated if id(named[n]) in inside), default=0)
    head = max((sizes[n] for n in updated if id(named[n]) not in inside), default=0)
    rounded = dtype.itemsize if dtype.itemsize < 4 else 0
    return max(
        (layer * dtype.itemsize, between + within),
        (head * max(4, dtype.itemsize), between + logits),
        (head * (max(4, dtype.itemsize) + rounded), between),
        key=sum,
    )


__all__ = ["Estimate", "estimate"]
