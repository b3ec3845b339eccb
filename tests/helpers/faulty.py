"""Ranks on which steps fail, and what the steps after are; ranks that differ, and one that ends."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from double import largest_difference
from sequence_runs import mesh_of, together
from sharded import by_layer, counted, inputs, whole
from torch import Tensor, nn

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, Plan, Stream
from fxmem.blocks.attach import state_of
from fxmem.runtime.region_code import RegionCode

FAULTS = 6


def transformed(blocks: Blocks | None = None, *, sharded: bool = False) -> Any:
    model: Any = tiny.model().double()
    if sharded:
        by_layer(model)
    return fxmem.transform(model, Plan(stream=Stream(chunk=9), blocks=blocks))


ENGINES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: nn.parallel.DistributedDataParallel(transformed()),
    "fsdp2": lambda: transformed(sharded=True),
    "sequence": lambda: together(tiny.model().double(), mesh_of(2), 9),
    "badam": lambda: transformed(Blocks(inactive=None), sharded=True),
    "badam alone": lambda: transformed(Blocks(inactive=None, average=True)),
}
"""Of the last two, gradients of the active block alone; those of the last are local."""


@contextlib.contextmanager
def failing(at: int, kind: str) -> Iterator[list[str]]:
    """The program at this place in a step raises; collects the kinds of those before it."""
    seen: list[str] = []
    choose = RegionCode.choose

    def chosen(code: Any, program: str, *given: Any) -> Any:
        seen.append(program)
        if len(seen) == at + 1:
            raise {"memory": MemoryError, "user": ZeroDivisionError}[kind]
        return choose(code, program, *given)

    RegionCode.choose = chosen  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        RegionCode.choose = choose  # type: ignore[method-assign]


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**batch).loss.backward()
    inside = getattr(model, "module", model)
    found = {n: whole(p.grad) for n, p in inside.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found  # type: ignore[return-value]


def expected(engine: str, rank: int) -> dict[str, Tensor]:
    plain = tiny.model().double()
    ranks = {"sequence": [0], "badam alone": [rank]}.get(engine, [0, 1])
    found = [gradients(plain, inputs(r)) for r in ranks]
    return {n: sum(f[n] for f in found) / len(ranks) for n in found[0]}  # type: ignore[misc]


def after_faults(rank: int, engine: str, seed: int) -> list[tuple[str, float]]:
    """Faults, drawn for all ranks alike, with the error of the step after each."""
    model = ENGINES[engine]()
    optimizer = BlockAdamW(model) if engine.startswith("badam") else None
    batch = inputs(0 if engine == "sequence" else rank)
    with failing(-1, "user") as programs:
        gradients(model, batch)
    want = expected(engine, rank)
    if optimizer is not None:
        want = {n: want[n] for n in state_of(model).active}
    # a backward that fails is the end of DistributedDataParallel's reducer in plain PyTorch too
    backward = next(i for i, p in enumerate(programs) if p.startswith("backward"))
    last = backward if engine == "ddp" else len(programs)
    draw, found = random.Random(seed), []
    for _ in range(FAULTS):
        at, kind = draw.randrange(last + 1), draw.choice(["memory", "user"])
        with failing(at, kind), contextlib.suppress(MemoryError, ZeroDivisionError):
            loss = model(**batch).loss
            if at == last:
                raise ZeroDivisionError  # a loss that fails
            loss.backward()
        model.zero_grad()
        got = gradients(model, batch)
        assert got.keys() == want.keys()
        found.append((f"{kind} at {at} of {last}", largest_difference(got, want)[0]))
    return found


def moved(rank: int) -> tuple[list[str], list[Tensor]]:
    """Backwards that fail when some inactive layers have moved: weights after the steps after."""
    model = transformed(Blocks(inactive=SGD(0.1), reach="all", steps=1), sharded=True)
    optimizer = BlockAdamW(model, lr=1e-2)
    with failing(-1, "user") as programs:
        gradients(model, inputs(rank))
    optimizer.step()
    first = next(i for i, p in enumerate(programs) if p.startswith("backward"))
    outcomes = []
    for at in range(first, len(programs)):
        with failing(at, "user"):
            try:
                model(**inputs(rank)).loss.backward()
                outcomes.append("none")
            except ZeroDivisionError:
                outcomes.append("raised")
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad()
            model(**inputs(rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcomes, [whole(p.detach()) for p in model.parameters()]  # type: ignore[misc]


def other_plans(rank: int) -> list[tuple[str, dict[str, int]]]:
    """What ranks are told that have other plans, and what was sent before."""
    kinds: list[Callable[[], Any]] = [
        lambda: transformed(Blocks(inactive=SGD(0.1) if rank else None), sharded=True),
        lambda: transformed(Blocks(inactive=None) if rank else None, sharded=True),
        lambda: transformed(Blocks(inactive=SGD(0.1 + rank), average=True)),
        lambda: _half_frozen(rank),
        lambda: nn.parallel.DistributedDataParallel(transformed(Blocks(steps=rank + 1))),
    ]
    found = []
    for kind in kinds:
        model = kind()
        optimizer = _optimizer(model)
        with counted() as sent:
            try:
                model(**inputs(rank)).loss.backward()
                message = "no error"
            except fxmem.FxmemError as raised:
                message = f"{type(raised).__name__}: {raised}"
        found.append((message, dict(sent)))
        del optimizer
    return found


def _optimizer(model: Any) -> Any:
    with contextlib.suppress(fxmem.NotTransformedError):  # a plan without blocks
        return BlockAdamW(model)


def _half_frozen(rank: int) -> Any:
    model: Any = tiny.model().double()
    model.lm_head.requires_grad_(rank == 0)
    by_layer(model)
    return fxmem.transform(model, Plan(stream=Stream(chunk=9)))


def killed(rank: int, folder: str) -> None:
    """Rank 1 ends in the middle of a backward; what rank 0 then raises goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    model: Any = tiny.model()
    by_layer(model)
    blocks = Blocks(inactive=SGD(0.1), reach="all", always_active=("model.norm",))
    fxmem.transform(model, Plan(stream=Stream(chunk=9), blocks=blocks))
    optimizer = BlockAdamW(model)
    for last in (False, True):
        loss = model(**inputs(rank)).loss
        if last and rank:
            model.model.layers[1].mlp.up_proj.weight.register_post_accumulate_grad_hook(_end)
        try:
            loss.backward()
        except RuntimeError as raised:  # of gloo, at the end of the backward
            Path(folder, "error").write_text(str(raised))
            break
        except fxmem.LostRankError as raised:
            Path(folder, "error").write_text(str(raised))
            break
        optimizer.step()
    os._exit(0)  # what is left of the group cannot be taken down in order


def _end(_: Tensor) -> None:
    os._exit(0)
