"""`fxmem.plan_for`: captures a model without its weights, and asks the ledgers what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fxmem.checks import byte_size
from fxmem.errors import PlanError
from fxmem.optional import require
from fxmem.planning.answer import Row, size
from fxmem.planning.curve import LONGEST, longest
from fxmem.planning.devices import device_of
from fxmem.planning.forecast import Forecast
from fxmem.planning.modes import Mode, mode_of
from fxmem.planning.ranks import of_a_rank, shards_of, spread, traffic
from fxmem.planning.source import config_of
from fxmem.planning.ways import Way, captured, ways_of
from fxmem.planning.weightless import without_weights


def plan_for(
    model: nn.Module | str | Any, *, memory: int | str | None = None, length: int | None = None,
    batch: int = 1, dtype: torch.dtype | None = None, optimizer: str = "adamw",
    device: str = "cpu", rank: int = 16, say: Callable[[str], None] = lambda line: None,
    ranks: int = 1,
) -> Forecast:  # fmt: skip
    """What fits, before anything runs: no weight is loaded, no step is taken.

    The model is captured once from shapes. Steps of plain autograd and with checkpoints are
    replayed operator by operator without data, streamed ones by the ledger of `fxmem.explain`.

    Args:
        model: a module that takes ``input_ids`` and ``labels`` and returns a ``loss``; a
            configuration of transformers; a folder with one, or a hub id (read from the cache where
            the hub cannot be reached).
        memory: bytes that a step may take on the device, weights and optimizer included: an
            integer or text such as ``"24GB"``. None takes what the device has (a GPU by its data
            sheet, a CPU what is free now).
        length: tokens per sequence of the steps to compare; None takes the longest that the chosen
            way to train fits.
        batch: sequences per step.
        dtype: of the weights; None takes the configuration's, of a module its first parameter's.
        optimizer: ``"adamw"``, ``"adamw8bit"``, ``"sgd"``, ``"blocks"`` or ``"lora"``.
        device: ``"cpu"`` or a GPU: ``"h100"``, ``"4090"``, ``"mi300x"`` and others.
        rank: of LoRA's adapters.
        say: told, in one line, what is going on.
        ranks: devices over which FSDP2 spreads the parameters, each layer a group of its own
            (``fully_shard``). Memory, batch and all figures are those of one of them.

    Raises:
        PlanError: a size, name or number that cannot be; or nothing fits, not even streamed one
            block at a time: says what the least is.
        UsageError: there is no such model.
    """
    limit = None if memory is None else byte_size("memory", memory)
    _check_number("length", length, 2, LONGEST)
    _check_number("batch", batch, 1, LONGEST)
    _check_number("ranks", ranks, 1, LONGEST)
    if ranks > 1 and optimizer == "blocks":
        raise PlanError(
            "the bytes of blocks on shards are not predicted", advice="plan for one rank"
        )
    empty, name, dtype = _model(model, dtype)
    place = device_of(device, dtype)
    limit = place.memory if limit is None else limit
    beside = optimizer if ranks > 1 else _beside(optimizer)
    made = [mode_of(n, empty, rank) for n in dict.fromkeys((optimizer, beside))]
    shards = shards_of(made[0].model, ranks)
    modes = [of_a_rank(mode, ranks) for mode in made]
    _check(modes, limit, name)
    say(f"capturing {name}")
    # with all that learns in any of the modes
    caught = captured(
        modes[0] if optimizer == "lora" else mode_of("sgd", empty, rank), length, batch
    )
    if ranks > 1:
        spread(caught, shards)
    ways = [way for mode in modes for way in ways_of(mode, caught, place, batch, shards)]
    found = []
    for way in ways:
        say(f"the longest sequence: {way.method}, {way.mode.name}")
        found.append(longest(way.needs, limit) if way.base < limit else 0)
    at = choose(ways, found, length, limit)
    length = length or found[at]
    say(f"steps of {length} tokens")
    rows = [_row(way, tokens, length) for way, tokens in zip(ways, found, strict=True)]
    say("what its layers keep")
    chosen = ways[at].within(length, limit)
    return Forecast(
        name, place.name, limit, length, batch, str(dtype).removeprefix("torch."), tuple(rows),
        rows[at], chosen.plan, chosen.parts, chosen.seconds, chosen.keeps,
        _notes(empty, length), chosen.steps, traffic(shards, modes[0]),
    )  # fmt: skip


def _beside(optimizer: str) -> str:
    """What is compared with this optimizer; adapters are compared with nothing."""
    return optimizer if optimizer == "lora" else "blocks"


def _row(way: Way, longest: int, length: int) -> Row:
    peak, half = way.bytes_at(length), length // 2
    per_token = (peak - way.bytes_at(half)) // (length - half)
    return Row(
        way.method, way.mode.name, longest, peak, per_token, way.away(length), way.seconds(length)
    )


def _check_number(name: str, value: object, least: int, most: int) -> None:
    if value is None or (type(value) is int and least <= value <= most):
        return
    raise PlanError(f"{name} is {value!r}", advice=f"give an integer from {least} to {most}")


def choose(ways: Sequence[Way], found: Sequence[int], length: int | None, limit: int) -> int:
    """Position of the way that the plan is for: streamed on the device, else with what waits moved
    away, else one block at a time.
    """
    streams = [i for i, way in enumerate(ways) if way.streams]
    for i in streams:
        if found[i] and (length is None or ways[i].needs(length) <= limit):
            return i
    tokens = length or 2
    least = min(ways[i].needs(tokens) for i in streams)
    raise PlanError(
        f"memory is {size(limit)}, and a step of {tokens} tokens takes at least {size(least)}",
        advice="give more memory, a shorter length or a smaller batch",
    )


def _notes(model: nn.Module, length: int) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    known = getattr(config, "max_position_embeddings", None)
    if isinstance(known, int) and length > known:
        return (f"the model itself is made for at most {known} positions",)
    return ()


def _model(model: Any, dtype: torch.dtype | None) -> tuple[nn.Module, str, torch.dtype]:
    """Without weights, in training mode; its name; its type."""
    if isinstance(model, nn.Module):
        first = next(model.parameters(), None)
        if first is None:
            raise PlanError(f"{type(model).__name__} has no parameters")
        shapes = without_weights(model, partial(torch.empty_like, device="meta"))
        if dtype is not None:
            shapes.to(dtype)
        return without_weights(shapes), type(model).__name__, dtype or first.dtype
    config = config_of(model) if isinstance(model, str) else model
    transformers = require("transformers")
    if not isinstance(config, transformers.PreTrainedConfig):
        raise PlanError(
            f"model is {config!r}", advice="give a module, a configuration, a folder or a hub id"
        )
    own = getattr(config, "dtype", None) or torch.float32
    kind = dtype or (getattr(torch, own) if isinstance(own, str) else own)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
    made.config.use_cache = False
    name = model if isinstance(model, str) else type(made).__name__
    return without_weights(made).train(), name, kind


def _check(modes: list[Mode], limit: int, name: str) -> None:
    least = min(m.weights + m.state for m in modes)
    if least > limit:
        raise PlanError(
            f"memory is {size(limit)}, and the weights and states of {name} alone take "
            f"{size(least)}", advice="give more memory, or a smaller dtype",
        )  # fmt: skip
