"""Parameters over several ranks: what ``fully_shard`` on every layer and on the model makes of a
step. Layers are groups; what lies outside of them is the root's, whole for the whole step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from fxmem.blocks.partition import layer_lists
from fxmem.planning.answer import Traffic
from fxmem.planning.modes import Mode
from fxmem.planning.moments import Steps
from fxmem.planning.weightless import Captured
from fxmem.streaming.shards import Shards


def shards_of(model: nn.Module, ranks: int) -> Shards:
    """The groups of a model, by parameter name."""
    layers = [f"{path}.{i}." for path, found in layer_lists(model) for i in range(len(found))]
    sizes = [0] * (1 + len(layers))
    owner = {}
    for name, parameter in model.named_parameters():
        at = next((i for i, layer in enumerate(layers, 1) if name.startswith(layer)), 0)
        owner[name] = at
        sizes[at] += parameter.nbytes
    return Shards(ranks, owner, tuple(sizes))


def spread(caught: Captured, shards: Shards) -> None:
    """The captured step is one of a rank from now on."""
    names = {id(p): name for name, p in caught.model.named_parameters()}
    owner = {
        leaf[1]: shards.owner[names[id(value)]] for leaf, value in caught.arguments.items()
        if leaf[0] == "input" and names.get(id(value)) in shards.owner
    }  # fmt: skip
    caught.graph.chunker.spread(replace(shards, owner=owner))


def of_a_rank(mode: Mode, ranks: int) -> Mode:
    """Weights and states of one rank."""
    weights = sum(p.nbytes for p in mode.model.parameters())
    part = mode.weights - weights + -(-weights // ranks)
    return replace(mode, weights=part, state=-(-mode.state // ranks))


def steps_of_a_rank(steps: Steps, shards: Shards, model: nn.Module) -> Steps:
    """A step of plain autograd with the groups that are whole meanwhile, at most: the root, a layer
    and the next one's buffer; and gradients of the root and of two layers before they are reduced.
    """
    if shards.ranks == 1:
        return steps
    gradients = [0] * len(shards.sizes)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[shards.owner[name]] += parameter.nbytes
    bytes_ = steps.bytes.copy()
    backward = np.maximum.accumulate(bytes_[:, 0] > 0)
    bytes_[:, 0] = -(-bytes_[:, 0] // shards.ranks)
    bytes_[:, 2] += shards.sizes[0] + 2 * max(shards.sizes[1:], default=0)
    bytes_[:, 2] += backward * (gradients[0] + 2 * max(gradients[1:], default=0))
    return Steps(bytes_, steps.made)


def traffic(shards: Shards, mode: Mode) -> Traffic | None:
    """None where every rank has everything."""
    if shards.ranks == 1:
        return None
    layers = sum(1 for size in shards.sizes[1:] if size)
    learn = {n: p for n, p in mode.model.named_parameters() if p.requires_grad}
    reductions = len({shards.owner[n] for n in learn})
    return Traffic(
        shards.ranks, 1 + 2 * layers, shards.sizes[0] + 2 * sum(shards.sizes[1:]), reductions,
        sum(p.nbytes for p in learn.values()),
    )  # fmt: skip
