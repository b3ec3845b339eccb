"""Pruners side by side on one model: ``python -m benchmarks.prune`` in the repository root.

Every row keeps the same part of the prunable parameters. Calibration and held-out text come from
disjoint topics of Python's reference. The search is a formulation consistent with the abstract of
"Computation and Memory-Efficient Model Compression with Gradient Reweighting" (NeurIPS 2025); its
rows say how few steps were run. Results are on disk after every row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxmem
from benchmarks import prune_measure as measure
from benchmarks.prune_peer import torch_pruning
from benchmarks.prune_report import save
from fxmem.demo.fetch import smollm2
from fxmem.demo.models import SMOLLM2

SEARCHES = ("fresh", "stale", "re-weighted")
BASELINES = ("random", "magnitude", "wanda", "taylor")
ROWS = (*BASELINES, *(f"{s} from {b}" for b in ("wanda", "taylor") for s in SEARCHES))


@dataclass(frozen=True)
class Options:
    """What to run; lengths are tokens per sequence."""

    model: str = SMOLLM2
    keep: tuple[float, ...] = (0.8, 0.7, 0.5)
    rows: tuple[str, ...] = ROWS
    steps: int = 200
    samples: int = 4
    age: int = 8
    lr: float = 0.02
    batch: int = 2
    length: int = 128
    held: int = 64
    calibration: int = 8
    blimp: Path | None = None
    pairs: int = 670
    time_length: int = 512
    time_batch: int = 4
    repeats: int = 3
    peer_seconds: int = 60
    threads: int = 1
    seed: int = 0
    out: Path = field(default=Path("benchmarks/results/prune"))


class Bench:
    """One dense model, its texts, and what was measured on it."""

    def __init__(self, options: Options) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.options = options
        self.folder = str(smollm2(say=print)) if options.model == SMOLLM2 else options.model
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rows, held = measure.texts(self.tokenizer, options.length, options.seed)
        self.held = held[: options.held]
        self.batches = [
            {"input_ids": x, "labels": x}
            for x in rows.split(options.batch)
            if len(x) == options.batch
        ]
        self.pairs = measure.pairs(options.blimp, options.pairs) if options.blimp else []
        self.coupled = fxmem.coupling(self.model)
        self.scores: dict[str, dict[str, Tensor]] = {}

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """Quality, speed and size of one model; the dense one is timed in turn with it."""
        o = self.options
        peak = measure.memory(model, o.time_length, o.time_batch)
        mine, dense = [], []
        for _ in range(o.repeats):
            mine.append(measure.speed(model, o.time_length, o.time_batch))
            dense.append(measure.speed(self.model, o.time_length, o.time_batch))
        best = [min(column) for column in zip(*mine, strict=True)]
        reference = [min(column) for column in zip(*dense, strict=True)]
        return {
            "perplexity": measure.perplexity(model, self.held),
            "blimp": measure.accuracy(model, self.tokenizer, self.pairs) if self.pairs else None,
            "stack_ms": best[0] * 1e3,
            "whole_ms": best[1] * 1e3,
            "stack_speedup": reference[0] / best[0],
            "whole_speedup": reference[1] / best[1],
            "peak_bytes": peak,
            "parameter_bytes": measure.parameter_bytes(model),
        }

    def masks(self, row: str, keep: float) -> tuple[fxmem.Masks, dict[str, Any]]:
        """The row's masks, and what finding them cost."""
        o, start = self.options, time.perf_counter()
        how = fxmem.Prune(
            keep=keep, steps=o.steps, samples=o.samples, age=o.age, lr=o.lr, seed=o.seed,
            init_batches=o.calibration,
        )  # fmt: skip
        some = self.batches[: o.calibration]
        scored = o.calibration * o.batch * o.length
        if row in BASELINES:
            values, masks = fxmem.score(self.model, some, row, how, coupled=self.coupled)
            self.scores[row] = values
            used = row in ("wanda", "taylor")
            spent = {"instantiations": 0, "forwards": o.calibration * used, "tokens": scored * used}
        else:
            kind, _, begin = row.partition(" from ")
            if begin not in self.scores:
                self.scores[begin] = fxmem.score(
                    self.model, some, begin, how, coupled=self.coupled
                )[0]
            masks, spent = self._search(kind, begin, how)
            spent["tokens"] += scored
        return masks, {**spent, "find_seconds": time.perf_counter() - start}

    def _search(
        self, kind: str, begin: str, how: fxmem.Prune
    ) -> tuple[fxmem.Masks, dict[str, Any]]:
        from dataclasses import replace

        changes: dict[str, Any] = {"init": begin}
        if kind == "fresh":
            changes["age"] = 1
        elif kind == "stale":
            changes["scope"] = "none"
        seen: list[Any] = []
        masks = fxmem.search(
            self.model, self.batches[how.init_batches :], replace(how, **changes),
            callback=seen.append, coupled=self.coupled, importance=self.scores[begin],
        )  # fmt: skip
        counts = seen[-1].counts
        per = self.options.batch * self.options.length
        return masks, {
            "instantiations": counts.instantiations,
            "submodels": counts.submodels,
            "forwards": counts.forwards,
            "tokens": counts.forwards * per,
            "steps": seen[-1].step,
            "ess": counts.ess,
            "clipped": sum(counts.clipped) / max(1, len(counts.clipped)),
        }


def work(options: Options) -> Iterator[tuple[float, str]]:
    """Kept part and row name; the smallest models first, where pruners differ most."""
    yield 1.0, "dense"
    for keep in sorted(options.keep):
        for row in (*options.rows, "torch-pruning"):
            yield keep, row


def run(options: Options) -> list[dict[str, Any]]:
    """Measure all rows; what fails is a row with its reason."""
    from rich.progress import Progress

    torch.set_num_threads(options.threads)
    bench, records = Bench(options), []
    todo = list(work(options))
    with Progress() as bar:
        task = bar.add_task("pruning", total=len(todo))
        for keep, row in todo:
            bar.update(task, description=f"{row}, keep {keep:g}")
            records.append({"keep": keep, "row": row, **_row(bench, row, keep)})
            save(records, options)
            bar.advance(task)
    return records


def _row(bench: Bench, row: str, keep: float) -> dict[str, Any]:
    if row == "dense":
        return {"status": "ok", **bench.measured(bench.model)}
    if row == "torch-pruning":
        return torch_pruning(bench.folder, keep, bench.held, bench.options)
    try:
        masks, spent = bench.masks(row, keep)
        small = fxmem.materialize(bench.model, masks, bench.coupled).eval()
        return {
            "status": "ok",
            **spent,
            **bench.measured(small),
            "removed": masks.sparsity(bench.coupled)["prunable"],
            "removed_of_all": masks.sparsity(bench.coupled)["parameters"],
        }
    except fxmem.FxmemError as error:
        return {"status": " ".join(str(error).split())}


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description=__doc__)
    default = Options()
    for name in ("model", "steps", "samples", "age", "lr", "batch", "length", "held", "calibration",
                 "pairs", "time_length", "time_batch", "repeats", "peer_seconds", "threads", "seed",
                 "out"):  # fmt: skip
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--blimp", type=Path, help="JSON lines of minimal pairs: good, bad, uid")
    parser.add_argument("--keep", type=_numbers, default=default.keep, help="such as 0.8,0.7,0.5")
    parser.add_argument("--rows", type=_names, default=default.rows, help=f"some of {ROWS}")
    values = vars(parser.parse_args(arguments))
    values["out"] = Path(values["out"])
    if wrong := [row for row in values["rows"] if row not in ROWS]:
        parser.error(f"unknown rows {wrong}")
    return Options(**values)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(x.strip() for x in text.split(",") if x.strip())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print the table."""
    options = _options(arguments)
    run(options)
    print(json.dumps(str(options.out)), (options.out / "prune.md").read_text(), sep="\n")


if __name__ == "__main__":
    main()
