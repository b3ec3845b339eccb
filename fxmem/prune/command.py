"""What ``fxmem prune`` does: a folder and a text in, a folder with a smaller model out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fxmem import files
from fxmem.errors import FileError, PlanError
from fxmem.frontend.inputs import without_cache
from fxmem.prune.recover import perplexity, recover
from fxmem.prune.search.search import search
from fxmem.prune.shrink.gate_gradients import loss_of
from fxmem.prune.shrink.materialize import coupling, materialize
from fxmem.prune.shrink.saving import save_pretrained
from fxmem.prune.units.options import Prune


def prune(options: Any) -> str:
    """Search, slice and write; returns one line of what was done.

    Args:
        options: the command's arguments; see ``fxmem prune --help``.

    Raises:
        PlanError: no model or text there, or a text shorter than one batch.
    """
    score = options.estimator == "score" or options.samples is not None
    steps = (200 if score else 40) if options.steps is None else options.steps
    if options.recover < 0:
        raise PlanError(f"--recover {options.recover}", advice="a number of steps")
    if options.distill and not options.recover:
        raise PlanError("--distill without --recover", advice="name the steps: --recover 200")
    how = Prune(
        keep=options.keep, steps=steps, init=options.init, seed=options.seed, kinds=options.kinds,
        round_to=options.round_to, estimator="score" if score else "gates", uniform=options.uniform,
        advanced={"samples": options.samples} if options.samples is not None else {},
    )  # fmt: skip
    if not options.data.is_file():
        raise PlanError(f"no text file at {options.data}", advice="name a file to calibrate on")
    if not (Path(options.model) / "config.json").is_file():
        raise PlanError(f"no model in {options.model}", advice="name a folder with config.json")
    files.folder(Path(options.out))  # before the search, which may take hours
    model, tokenizer = _read(options)
    data = _batches(tokenizer, options.data, options.length, options.batch, options.device)
    coupled = coupling(model)
    # the end of the text is for measuring, where there is enough of it
    held = max(1, len(data) // 8)
    rows, tail = (data[:-held], data[-held:]) if len(data) >= 4 else (data, data)
    masks = search(model, rows, how, progress=True, coupled=coupled)
    mended = _some(rows) if options.repair else None
    small = materialize(model, masks, coupled, repair=mended)
    found = [perplexity(model, tail), perplexity(small, tail)]
    if options.recover:
        teacher = model if options.distill else None
        recover(small, teacher, rows, steps=options.recover, progress=True)
        found.append(perplexity(small, tail))
    save_pretrained(small, options.out)
    try:
        tokenizer.save_pretrained(options.out)
    except OSError as error:
        raise FileError(f"the tokenizer cannot be written to {options.out}: {error}") from error
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    where = "on held-out text" if tail is not data else "on the text itself, too short to hold out"
    return (
        f"{masks.sparsity(coupled)['prunable']:.1%} of the prunable parameters removed, "
        f"{before:,} -> {after:,} parameters; perplexity {where} "
        f"{' -> '.join(f'{value:.2f}' for value in found)}; "
        f"{' -> '.join(f'{_speed(m, tail[0]):,.0f}' for m in (model, small))} tokens/s forward; "
        f"{options.out}"
    )


REPAIRED = 4096
"""Tokens that a repair sees."""


def _read(options: Any) -> tuple[Any, Any]:
    """The dense model and its tokenizer.

    Raises:
        FileError: they cannot be read.
        PlanError: there is no such device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"the model in {options.model} cannot be read: {error}") from error
    try:
        return model.to(options.device), tokenizer
    except (RuntimeError, AssertionError) as error:  # what torch raises of an unknown device
        raise PlanError(f"device {options.device!r}: {error}", advice="such as cpu") from error


def _some(rows: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return rows[: max(2, REPAIRED // rows[0]["input_ids"].numel())]


@torch.no_grad()
def _speed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Tokens per second of a forward, the best of three."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        float(loss_of(model(**without_cache(model, batch))))  # which waits for the device
        seconds.append(time.perf_counter() - begin)
    return batch["input_ids"].numel() / min(seconds)


def _batches(
    tokenizer: Any, file: Path, length: int, batch: int, device: str
) -> list[dict[str, torch.Tensor]]:
    for name, value, least in (("length", length, 2), ("batch", batch, 1)):
        if value < least:
            raise PlanError(f"{name} is {value}", advice=f"at least {least}")
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} is no text that can be read: {error}") from error
    ids = tokenizer(text)["input_ids"]
    count = len(ids) // (length * batch)
    if not count:
        raise PlanError(
            f"{file} has {len(ids)} tokens, one batch needs {length * batch}",
            advice="a longer text, or a smaller --length or --batch",
        )
    rows = torch.tensor(ids[: count * length * batch], device=device).view(count, batch, length)
    return [{"input_ids": x, "labels": x} for x in rows]
