"""The setups that compete, each a combination of techniques, as a user would switch them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from benchmarks.objectives import ALL
from benchmarks.tiled import tile_mlps
from fxmem.demo.models import enable_checkpointing

LCE_ROWS = 256
TILES = 4


@dataclass(frozen=True)
class Setup:
    """One row of the benchmark.

    Attributes:
        label: what tables call it.
        checkpoint: transformers' activation checkpointing.
        linear_ce: ``F.linear_cross_entropy`` in chunks of 256 rows instead of the model's loss.
        tiles: tiles of every MLP; 0 leaves it whole.
        inductor: compile the loss function, static shapes.
        chunker: Inductor's ``auto_chunker``.
        fxmem: "" for none, "transform" for the model, "compile" for the loss function.
        lower: the plan's way to run chunk bodies.
        stream: options of ``fxmem.Stream``.
    """

    label: str
    checkpoint: bool = False
    linear_ce: bool = False
    tiles: int = 0
    inductor: bool = False
    chunker: bool = False
    fxmem: str = ""
    lower: Literal["auto", "inductor"] = "auto"
    stream: tuple[tuple[str, str], ...] = ()


class Setups(dict[str, Setup]):
    """By name; ``fxmem:memory=2GB,offload=disk`` is fxmem with those options of ``Stream``."""

    def __missing__(self, name: str) -> Setup:
        base, colon, text = name.partition(":")
        pairs = tuple(tuple(part.split("=", 1)) for part in text.split(","))
        if base != "fxmem" or not colon or any(len(p) != 2 for p in pairs):
            raise KeyError(name)
        label = f"fxmem, {', '.join(' '.join(p) for p in pairs)}"
        self[name] = replace(self[base], label=label, stream=pairs)
        return self[name]


SETUPS = Setups({
    "plain": Setup("plain autograd"),
    "checkpoint": Setup("checkpointing", checkpoint=True),
    "checkpoint+lce": Setup("checkpointing + linear CE", checkpoint=True, linear_ce=True),
    "checkpoint+lce+tiles": Setup(
        "checkpointing + linear CE + tiled MLP", checkpoint=True, linear_ce=True, tiles=TILES
    ),
    "chunker": Setup("Inductor + auto_chunker", inductor=True, chunker=True),
    "fxmem": Setup("fxmem", fxmem="transform"),
    # Not in the default run.
    "lce": Setup("linear CE", linear_ce=True),
    "inductor": Setup("Inductor", inductor=True),
    "fxmem+inductor": Setup("fxmem + Inductor", fxmem="transform", lower="inductor"),
    "fxmem-compile": Setup("fxmem through torch.compile", fxmem="compile"),
})  # fmt: skip

DEFAULT = tuple(SETUPS)[:6]


def why_not(setup: Setup, objective: str) -> str | None:
    """Why this setup cannot run this objective, or None where it can."""
    if setup.linear_ce and objective != "sft":
        return (
            "not applicable: F.linear_cross_entropy chunks a summed or averaged loss; "
            "log-probabilities per token fall back to whole logits"
        )
    return None


def build(
    setup: Setup, model: Any, objective: str, ids: torch.Tensor, chunk: int | Literal["auto"]
) -> Callable[[], torch.Tensor]:
    """Prepare the model in place; the result runs one forward and returns the loss."""
    loss, _ = ALL[objective]
    if setup.checkpoint:
        enable_checkpointing(model)
    if setup.tiles and not tile_mlps(model, setup.tiles):
        raise RuntimeError("no MLP was found to tile")
    if setup.linear_ce:
        loss = _linear_ce
    run = _on_model(loss, model)
    if setup.inductor:
        options: dict[str, Any] = {"auto_chunker.enable": True} if setup.chunker else {}
        run = torch.compile(run, dynamic=False, options=options)
    elif setup.fxmem:
        run = _with_fxmem(run, model, objective, setup, chunk)
    return lambda: run(ids)


def _on_model(
    loss: Callable[[Any, torch.Tensor], torch.Tensor], model: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(ids: torch.Tensor) -> torch.Tensor:
        return loss(model, ids)

    return run


def _with_fxmem(
    run: Callable[[torch.Tensor], torch.Tensor],
    model: Any,
    objective: str,
    setup: Setup,
    chunk: int | Literal["auto"],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A loss inside the model streams by `transform`, one in user code by `torch.compile`."""
    import fxmem

    plan = fxmem.Plan(stream=fxmem.Stream(chunk=chunk, **dict(setup.stream)), lower=setup.lower)
    if setup.fxmem == "transform" and objective == "sft":
        fxmem.transform(model, plan)
        return run
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
        run, backend=fxmem.backend(plan)
    )
    return compiled


def _linear_ce(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    # Shifting the labels instead of the hidden states avoids a copy of the latter.
    labels_BT = F.pad(ids_BT[:, 1:], (0, 1), value=-100)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LCE_ROWS, chunking_method=None)
    loss: torch.Tensor = F.linear_cross_entropy(
        hidden_BTD.flatten(0, 1),
        model.get_output_embeddings().weight,
        labels_BT.flatten(),
        ignore_index=-100,
        options=options,
    )
    return loss
