"""What ``fxmem prune`` does: a folder and a text in, a folder with a smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fxmem import files
from fxmem.errors import FileError, PlanError
from fxmem.prune.search.search import search
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
    how = Prune(
        keep=options.keep, steps=options.steps, samples=options.samples, init=options.init,
        seed=options.seed, kinds=options.kinds,
    )  # fmt: skip
    if not options.data.is_file():
        raise PlanError(f"no text file at {options.data}", advice="name a file to calibrate on")
    if not (Path(options.model) / "config.json").is_file():
        raise PlanError(f"no model in {options.model}", advice="name a folder with config.json")
    files.folder(Path(options.out))  # before the search, which may take hours
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"the model in {options.model} cannot be read: {error}") from error
    data = _batches(tokenizer, options.data, options.length, options.batch)
    coupled = coupling(model)
    masks = search(model, data, how, progress=True, coupled=coupled)
    small = materialize(model, masks, coupled)
    save_pretrained(small, options.out)
    try:
        tokenizer.save_pretrained(options.out)
    except OSError as error:
        raise FileError(f"the tokenizer cannot be written to {options.out}: {error}") from error
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return (
        f"{masks.sparsity(coupled)['prunable']:.1%} of the prunable parameters removed, "
        f"{before:,} -> {after:,} parameters; {options.out}"
    )


def _batches(tokenizer: Any, file: Path, length: int, batch: int) -> list[dict[str, torch.Tensor]]:
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
    rows = torch.tensor(ids[: count * length * batch]).view(count, batch, length)
    return [{"input_ids": x, "labels": x} for x in rows]
