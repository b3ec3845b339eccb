"""What happens under ``fully_shard`` between a call, the loss outside of it, and the backward."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from sharded import by_layer, head_apart, inputs, root_only, state
from sharded_uses import Runs, Shards, compared, llama
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def ids_of(rank: int, seed: int) -> dict[str, Tensor]:
    return {k: v for k, v in inputs(rank, seed).items() if k != "labels"}


def loss_of(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1).square().mean()


def zeroed(net: Any, rank: int) -> Any:
    """Gradients of the step before are dropped when the next call has been made."""
    found = []
    for i in range(3):
        logits = net(**ids_of(rank, i)).logits
        net.zero_grad()
        loss = loss_of(logits)
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


def zeroed_late(net: Any, rank: int) -> Any:
    """The same after the loss, whether that is made outside or inside."""
    found = []
    for i in range(4):
        given = inputs(rank, i) if i % 2 else ids_of(rank, i)
        out = net(**given)
        loss = out.loss if i % 2 else loss_of(out.logits)
        net.zero_grad()
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


def evaluated(net: Any, rank: int) -> Any:
    found = []
    for i in range(2):
        net.zero_grad()
        logits = net(**ids_of(rank, i)).logits
        with torch.no_grad():
            other = net(**tiny.batch(2, 9 + rank)).loss
        loss = loss_of(logits)
        loss.backward()
        found.append(([loss.item(), other.item()], state(net)))
    return found


def of_two_calls(net: Any, rank: int) -> Any:
    found = []
    for i in range(2):
        net.zero_grad()
        one, two = (net(**ids_of(rank, 2 * i + k)).logits for k in range(2))
        loss = (loss_of(one) - 2 * loss_of(two)).square()
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


def shown(net: Any, rank: int) -> Any:
    """What the model says its parameters are."""
    logits = net(**ids_of(rank, 0)).logits
    shapes = [p.shape for p in net.parameters()]
    loss = loss_of(logits)
    loss.backward()
    return [([loss.item(), *map(sum, shapes)], state(net))]


def unread(net: Any, rank: int) -> Any:
    """Logits that nobody reads, then a step."""
    net(**ids_of(rank, 0))
    shapes = [p.shape for p in net.parameters()]
    loss = net(**inputs(rank, 1)).loss
    loss.backward()
    return [([loss.item(), *map(sum, shapes)], state(net))]


def saved(net: Any, rank: int) -> Any:
    """A ``state_dict`` closes what is open; a part of the model is called by itself."""
    found = []
    for i in range(2):
        logits = net(**ids_of(rank, i)).logits
        names = float(len(net.state_dict()))
        loss = loss_of(logits)
        loss.backward()
        found.append(([loss.item(), names], state(net)))
    return found


def in_part(net: Any, rank: int) -> Any:
    """The head is called by itself where it is a group."""
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    found = []
    for i in range(2):
        net.zero_grad()
        logits = net(**ids_of(rank, i)).logits
        with torch.no_grad():
            other = hidden.sum()
            if isinstance(net.lm_head, FSDPModule):
                other = net.model.norm(hidden).sum() + net.lm_head(hidden).sum()
        loss = loss_of(logits)
        loss.backward()
        found.append(([loss.item(), other.item()], state(net)))
    return found


RUNS: tuple[Runs, ...] = (
    zeroed, zeroed_late, evaluated, of_two_calls, shown, unread, saved, in_part,
)  # fmt: skip
WAYS: dict[str, Shards] = {
    "layers": by_layer,
    "head": head_apart,
    "all": lambda m: root_only(m, reshard_after_forward=True),
}
AGAIN = {
    "layers": (), "head": ("evaluated", "saved", "in_part"),
    "all": ("evaluated", "saved", "of_two_calls"),
}  # fmt: skip
"""Where something closes in each of two calls what waits for the loss, which gathers it again."""


def between(rank: int, way: str) -> dict[str, Any]:
    return {run.__name__: compared(llama(), WAYS[way], run, rank) for run in RUNS}
