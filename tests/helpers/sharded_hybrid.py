"""Uses of ``fully_shard`` that need four ranks: replicas of shards, and smaller meshes between
forward and backward."""

from __future__ import annotations

from typing import Any

from sharded import by_layer, head_apart, inputs, state
from sharded_uses import (
    Runs,
    Shards,
    compared,
    llama,
    long_and_short,
    open_between_steps,
    several_calls,
    two_steps,
)
from torch.distributed.device_mesh import init_device_mesh


def replicas(model: Any, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    by_layer(model, mesh=mesh, **options)


def pairs_after_forward(model: Any) -> None:
    """Weights wait for the backward on meshes of two ranks."""
    by_layer(model, reshard_after_forward=2)


def replicas_ahead(model: Any) -> None:
    replicas(model)
    layers = list(model.model.layers)
    model.set_modules_to_forward_prefetch(layers[:1])
    layers[0].set_modules_to_forward_prefetch(layers[1:])
    layers[1].set_modules_to_backward_prefetch(layers[:1])


def head_in_pairs(model: Any) -> None:
    head_apart(model, reshard_after_forward=2)


def summed_late(net: Any, rank: int) -> Any:
    """Replicas add their sums up with the last of several batches; shards with each."""
    found = []
    for i in range(6):
        net.set_requires_all_reduce(i % 3 == 2)
        net(**inputs(rank, i)).loss.backward()
        if i % 3 == 2:
            found.append(([], state(net)))
            net.zero_grad()
    return found


def sent_late(net: Any, rank: int) -> Any:
    """Nothing is reduced before the last of several batches, and shards stay or not."""
    found = []
    for i in range(6):
        last = i % 3 == 2
        net.set_requires_gradient_sync(last)
        net.set_is_last_backward(last)
        net.set_reshard_after_backward(last or i > 2)
        net(**inputs(rank, i)).loss.backward()
        if last:
            found.append(([], state(net)))
            net.zero_grad()
    return found


def outside_and_inside(net: Any, rank: int) -> Any:
    """Half of the ranks have their loss outside the model."""
    found = []
    for i in range(2):
        net.zero_grad()
        batch = inputs(rank, i)
        if (rank // 2 + i) % 2:
            del batch["labels"]
            loss = net(**batch).logits.logsumexp(-1).square().mean()
        else:
            loss = net(**batch).loss
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


OF_FOUR: dict[str, tuple[Shards, Runs]] = {
    "replicas": (replicas, two_steps),
    "replicas, summed late": (replicas, summed_late),
    "replicas, sent late": (replicas, sent_late),
    "replicas, open between steps": (replicas, open_between_steps),
    "replicas, prefetch": (replicas_ahead, two_steps),
    "replicas, long and short": (replicas, long_and_short),
    "replicas, outside": (replicas, outside_and_inside),
    "pairs": (pairs_after_forward, two_steps),
    "pairs, several calls": (pairs_after_forward, several_calls),
    "pairs, sent late": (pairs_after_forward, sent_late),
    "pairs, long and short": (pairs_after_forward, long_and_short),
    "pairs, head": (head_in_pairs, outside_and_inside),
}


def used_by_four(rank: int, names: list[str]) -> dict[str, Any]:
    return {name: compared(llama(), *OF_FOUR[name], rank) for name in names}
