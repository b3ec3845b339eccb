"""Pruners side by side on one model: ``python -m benchmarks.prune`` in the repository root.

Every row keeps the same part of the prunable parameters. Calibration and held-out text come from
disjoint topics of Python's reference; ``--second FILE`` measures on a text of another kind as well.
Seconds to find are those of the CPU. The searches are formulations consistent with the abstract of
"Computation and Memory-Efficient Model Compression with Gradient Reweighting" (NeurIPS 2025).

Every row is on disk as soon as it is measured, and an interrupted run goes on where it stopped, in
the middle of a search too. Forward times are measured last, all rows in turn; ``--times later``
leaves them to another run, for a quiet machine, with ``--times only``.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import fxmem
from benchmarks import prune_measure as measure
from benchmarks.prune_peer import torch_pruning
from benchmarks.prune_report import BASELINES, PEERS, REPAIR, ROWS, load, save
from fxmem.demo.fetch import smollm2
from fxmem.demo.models import SMOLLM2


@dataclass(frozen=True)
class Options:
    """What to run; lengths are tokens per sequence."""

    model: str = SMOLLM2
    keep: tuple[float, ...] = (0.5,)
    rows: tuple[str, ...] = ROWS
    steps: int = 40
    score_steps: int = 240
    samples: int = 6
    batch: int = 2
    length: int = 256
    held: int = 16
    calibration: int = 8
    second: Path | None = None
    blimp: Path | None = None
    pairs: int = 134
    time_length: int = 512
    time_batch: int = 4
    repeats: int = 3
    peer_seconds: int = 120
    threads: int = 1
    seed: int = 0
    times: str = "now"
    out: Path = field(default=Path("benchmarks/results/prune"))

    @property
    def state(self) -> Path:
        """Folder of masks and unfinished searches."""
        return self.out / "state"


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
        first = options.calibration * options.batch
        self.batches = [{"input_ids": x, "labels": x} for x in rows[:first].split(options.batch)]
        self.steps = {
            length: [
                {"input_ids": x, "labels": x}
                for x in rows[first:, : options.length // length * length].reshape(-1, 1, length)
            ]
            for length in (options.length, max(2, options.length // 4))
        }
        self.second = (
            measure.rows_of(self.tokenizer, options.second, options.length, options.held)
            if options.second
            else None
        )
        self.pairs = measure.pairs(options.blimp, options.pairs) if options.blimp else []
        self.coupled = self._coupling()
        self.scores: dict[str, tuple[dict[str, Tensor], float]] = {}

    def _coupling(self) -> fxmem.Coupling:
        """Traced once per folder of results: it takes as long as a few rows' forwards."""
        file = self.options.state / "coupling.pickle"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            found = fxmem.coupling(self.model)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(pickle.dumps(found))
            part.replace(file)
            return found
        found = pickle.loads(file.read_bytes())  # written by this benchmark
        return cast(fxmem.Coupling, found)

    def quality(self, model: nn.Module) -> dict[str, Any]:
        """Perplexity, minimal pairs and bytes of one model."""
        o = self.options
        pairs = self.pairs
        return {
            "perplexity": measure.perplexity(model, self.held),
            "second": None if self.second is None else measure.perplexity(model, self.second),
            "blimp": measure.accuracy(model, self.tokenizer, pairs) if pairs else None,
            "peak_bytes": measure.memory(model, o.time_length, o.time_batch),
            "parameter_bytes": measure.parameter_bytes(model),
        }

    def small(self, masks: fxmem.Masks, row: str) -> nn.Module:
        """The model that the masks leave, repaired where the row says so."""
        rows = self.batches if row.endswith(REPAIR) else None
        return fxmem.materialize(self.model, masks, self.coupled, repair=rows).eval()

    def masks(self, row: str, keep: float, say: Any) -> tuple[fxmem.Masks, dict[str, Any]]:
        """The row's masks, and what finding them cost."""
        o = self.options
        how = fxmem.Prune(keep=keep, steps=o.steps, seed=o.seed)
        steps = self.steps[o.length]
        if row == "score":
            steps = self.steps[max(2, o.length // 4)]
            how = fxmem.Prune(
                keep=keep, steps=o.score_steps, seed=o.seed, estimator="score",
                advanced={"samples": o.samples},
            )  # fmt: skip
        elif row in BASELINES:
            how = fxmem.Prune(keep=keep, steps=0, seed=o.seed, init=row)  # type: ignore[arg-type]
        importance, before = self._importance(row if row in BASELINES else "taylor", row)
        start = time.process_time()
        if row in BASELINES:
            masks = fxmem.search(
                self.model, steps, how, coupled=self.coupled, importance=importance
            )
            return masks, {"find_seconds": before}
        last: list[Any] = [None]

        def watch(step: Any) -> None:
            last[0] = step
            say(f"step {step.step} of {how.steps}, loss of the sub-model {step.loss:.3f}")

        o.state.mkdir(parents=True, exist_ok=True)
        file = o.state / f"{keep:g} {row}.pt"
        masks = fxmem.search(
            self.model, steps, how, callback=watch, coupled=self.coupled, importance=importance,
            checkpoint=file,
        )  # fmt: skip
        spent = time.process_time() - start
        file.unlink()
        return masks, _counted(last[0].counts, steps, before + spent)

    def _importance(self, method: str, row: str) -> tuple[dict[str, Tensor], float]:
        """Importance to start from and the seconds it took, once for all kept parts.

        The search by gates takes half of the rows, one at a time.
        """
        key = f"{method}, singly" if row == "gates" else method
        if key not in self.scores:
            rows = [b["input_ids"][:1] if row == "gates" else b["input_ids"] for b in self.batches]
            start = time.process_time()
            found, _ = fxmem.score(
                self.model, [{"input_ids": x, "labels": x} for x in rows], method,
                fxmem.Prune(seed=self.options.seed), coupled=self.coupled,
            )  # fmt: skip
            self.scores[key] = found, time.process_time() - start
        return self.scores[key]


def _counted(counts: Any, steps: Sequence[Any], spent: float) -> dict[str, Any]:
    return {
        "steps": len(counts.losses),
        "instantiations": counts.instantiations,
        "submodels": counts.submodels,
        "built_size": counts.size / counts.submodels,
        "forwards": counts.forwards,
        "tokens": counts.forwards * steps[0]["input_ids"].numel(),
        "instantiate_ms": 1e3 * counts.building / counts.submodels,
        "forward_ms": 1e3 * counts.running / counts.forwards,
        "sampled": counts.losses,
        "find_seconds": spent,
    }


def work(options: Options) -> Iterator[tuple[float, str]]:
    """Kept part and row name; the smallest models first, where pruners differ most."""
    yield 1.0, "dense"
    for keep in sorted(options.keep):
        for row in options.rows:
            yield keep, row


def run(options: Options) -> list[dict[str, Any]]:
    """Measure all rows that are not on disk yet; what fails is a row with its reason."""
    from rich.progress import Progress

    torch.set_num_threads(options.threads)
    records = load(options)
    there = {(r["keep"], r["row"]) for r in records}
    todo = [pair for pair in work(options) if pair not in there and options.times != "only"]
    if not todo and options.times == "later":
        return records
    bench = Bench(options)
    with Progress() as bar:
        task = bar.add_task("pruning", total=len(todo))
        for keep, row in todo:
            bar.update(task, description=f"{row}, keep {keep:g}")
            start = time.perf_counter()
            record = {"keep": keep, "row": row, **_row(bench, row, keep, bar.console.print)}
            records = save([*records, record], options)
            found = f"perplexity {record['perplexity']:.2f}" if "perplexity" in record else ""
            took = time.perf_counter() - start
            bar.console.print(f"{keep:g} {row}: {record['status']} {found} ({took:.0f} s)")
            bar.advance(task)
    if options.times != "later":
        _times(bench, records)
        records = save(records, options)
    return records


def _masks_file(options: Options, keep: float, row: str) -> Path:
    return options.state / f"{keep:g} {row}.json"


def _row(bench: Bench, row: str, keep: float, say: Any) -> dict[str, Any]:
    if row == "dense":
        return {"status": "ok", **bench.quality(bench.model)}
    if row in PEERS:
        return torch_pruning(bench.folder, keep, row == PEERS[1], bench.held, bench.options)
    try:
        base = row.removesuffix(REPAIR)
        file = _masks_file(bench.options, keep, base)
        if row != base and file.exists():
            masks, spent = fxmem.Masks.from_json(file.read_text()), _cost(bench, keep, base)
        else:
            masks, spent = bench.masks(base, keep, say)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(masks.to_json())
        gone = masks.sparsity(bench.coupled)
        start = time.process_time()
        small = bench.small(masks, row)
        if row != base:
            spent["find_seconds"] += time.process_time() - start
        return {
            "status": "ok",
            **spent,
            **bench.quality(small),
            "removed": gone["prunable"],
            "removed_of_all": gone["parameters"],
            "removed_macs": gone["macs"],
        }
    except fxmem.FxmemError as error:
        return {"status": " ".join(str(error).split())}


def _cost(bench: Bench, keep: float, row: str) -> dict[str, Any]:
    """What an earlier row's masks cost."""
    at = {(r["keep"], r["row"]): r for r in load(bench.options)}[keep, row]
    return {k: at[k] for k in ("find_seconds", "steps", "forwards", "tokens") if k in at}


def _times(bench: Bench, records: list[dict[str, Any]]) -> None:
    """Forward times of all rows with masks: each round measures every row once, dense first."""
    o = bench.options
    timed: list[tuple[dict[str, Any], nn.Module]] = []
    for record in records:
        file = _masks_file(o, record["keep"], record["row"].removesuffix(REPAIR))
        if record["row"] == "dense":
            timed.insert(0, (record, bench.model))
        elif record["status"] == "ok" and file.exists():
            masks = fxmem.Masks.from_json(file.read_text())
            timed.append((record, bench.small(masks, record["row"])))
    rounds = [
        [measure.speed(model, o.time_length, o.time_batch) for _, model in timed]
        for _ in range(o.repeats)
    ]
    best = [tuple(min(x) for x in zip(*row, strict=True)) for row in zip(*rounds, strict=True)]
    for (record, _), (stack, whole) in zip(timed, best, strict=True):
        record["stack_ms"], record["whole_ms"] = stack * 1e3, whole * 1e3
        record["stack_speedup"] = best[0][0] / stack
        record["whole_speedup"] = best[0][1] / whole


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description=__doc__)
    default = Options()
    for name in ("model", "steps", "score_steps", "samples", "batch", "length", "held",
                 "calibration", "pairs", "time_length",
                 "time_batch", "repeats", "peer_seconds", "threads", "seed", "out"):  # fmt: skip
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--second", type=Path, help="another text, or JSON lines of texts")
    parser.add_argument("--blimp", type=Path, help="JSON lines of minimal pairs: good, bad, uid")
    parser.add_argument("--keep", type=_numbers, default=default.keep, help="such as 0.8,0.7,0.5")
    parser.add_argument("--rows", type=_names, default=default.rows, help=f"some of {ROWS}")
    parser.add_argument("--times", choices=("now", "later", "only"), default="now")
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
