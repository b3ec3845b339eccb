"""What ``fxmem prune`` does: a folder and a text in, a folder with a smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fxmem.errors import PlanError
from fxmem.prune.materialize import coupling, materialize
from fxmem.prune.options import Prune
from fxmem.prune.saving import save_pretrained
from fxmem.prune.search import search


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = _batches(tokenizer, options.data, options.length, options.batch)
    coupled = coupling(model)
    masks = search(model, data, how, progress=True, coupled=coupled)
    small = materialize(model, masks, coupled)
    save_pretrained(small, options.out)
    tokenizer.save_pretrained(options.out)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return (
        f"{masks.sparsity(coupled)['prunable']:.1%} of the prunable parameters removed, "
        f"{before:,} -> {after:,} parameters; {options.out}"
    )


def _batches(tokenizer: Any, file: Path, length: int, batch: int) -> list[dict[str, torch.Tensor]]:
    for name, value, least in (("length", length, 2), ("batch", batch, 1)):
        if value < least:
            raise PlanError(f"{name} is {value}", advice=f"at least {least}")
    ids = tokenizer(file.read_text())["input_ids"]
    count = len(ids) // (length * batch)
    if not count:
        raise PlanError(
            f"{file} has {len(ids)} tokens, one batch needs {length * batch}",
            advice="a longer text, or a smaller --length or --batch",
        )
    rows = torch.tensor(ids[: count * length * batch]).view(count, batch, length)
    return [{"input_ids": x, "labels": x} for x in rows]
