"""Sizes that a capture is to take for symbolic; see :mod:`fxmem._compat.graph`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import fx

__all__ = ["STAND_IN", "mark_axis_dynamic", "mark_dynamic", "mark_inputs"]


def mark_dynamic(tensor: torch.Tensor, sizes: Collection[int] | None = None) -> list[int]:
    """Mark every dimension of size > 1 as symbolic (a wish, not a demand); those newly marked.
    ``sizes``: those of no other size.
    """
    fresh = [
        d for d in range(tensor.dim())
        if tensor.shape[d] > 1 and (sizes is None or tensor.shape[d] in sizes)
        and d not in getattr(tensor, "_dynamo_weak_dynamic_indices", ())
    ]  # fmt: skip
    for d in fresh:
        torch._dynamo.maybe_mark_dynamic(tensor, d)
    return fresh


def mark_axis_dynamic(tensor: torch.Tensor, axis: int) -> None:
    """Demand that one axis is a symbolic size; a graph that fixes it is an error."""
    torch._dynamo.mark_dynamic(tensor, axis)


def mark_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Mark the tensors that vary from call to call, neither parameters nor attributes of a module;
    True if the capture has fixed a size that nobody had asked to be symbolic.

    What the model itself holds outside of modules and buffers may be set anew for every call, as a
    mask would be, or may be there for good, as the numbers of virtual tokens are: only what is as
    long as an argument varies with it, and whole batches.
    """
    found = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = "" if source is None else source.name
        if not hasattr(value, STAND_IN) and "_modules" not in name and "_buffers" not in name:
            found.append((node.meta["example_value"], value, name.startswith("L['self']")))
    given = [v.shape for _, v, held in found if not held]
    lengths = {n + i for shape in given for n in shape[1:] for i in (-1, 0, 1)}
    batched = lengths | {shape[0] for shape in given if shape}
    again = False
    for fake, value, held in found:
        sizes = None if not held else batched if value.dim() > 1 else lengths
        again |= any([isinstance(fake.shape[d], int) for d in mark_dynamic(value, sizes)])
    return again


STAND_IN = "_fxmem_stand_in"
"""An attribute of tensors whose sizes that vary are marked already."""
