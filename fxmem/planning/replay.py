"""A step of plain autograd, and one with checkpoints: the model itself runs with fake weights, so
nothing is computed or allocated, and a watch sees every storage come and go.

Token ids are real, so that code that looks at them (masks) does what it does in training.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxmem._compat import graph as _compat
from fxmem.blocks.partition import layer_lists
from fxmem.frontend.experts import streamable
from fxmem.planning.moments import Recording, Steps
from fxmem.planning.weightless import without_weights


def plain_step(
    model: nn.Module, length: int, batch: int, *, checkpoints: bool = False,
    learning: Collection[str] | None = None, workspaces: bool = True,
) -> Steps:  # fmt: skip
    """Bytes at each operator of a forward and its backward, above parameters and inputs.

    Args:
        model: takes ``input_ids`` and ``labels``; its weights are not read.
        length: tokens per sequence.
        batch: sequences.
        checkpoints: recompute each layer in the backward.
        learning: names of the parameters that want a gradient; None for those that do now.
        workspaces: count what operators of a CPU allocate within themselves.
    """
    mode = _compat.FakeTensorMode(allow_non_fake_inputs=True)
    twin = without_weights(model, partial(_fake, mode))
    for name, p in twin.named_parameters():
        p.requires_grad_(p.requires_grad if learning is None else name in learning)
    if checkpoints:
        for _, layers in layer_lists(twin):
            for layer in layers:
                layer.forward = partial(_checkpointed, layer.forward)
    ids = torch.zeros(batch, length, dtype=torch.long)
    watch = Recording(workspaces)
    watch.ignore([ids, *twin.parameters(), *twin.buffers()])
    with streamable(twin), torch.enable_grad(), watch:
        # as in a user's step, logits go before the backward where nothing else needs them
        loss = twin(input_ids=ids, labels=ids).loss
        saved = watch.waiting()
        loss.backward()
        del loss
    return watch.steps(saved, [p.grad for p in twin.parameters() if p.grad is not None])


def _fake(mode: Any, tensor: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
