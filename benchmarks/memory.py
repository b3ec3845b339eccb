"""Predicted memory beside measured memory, and budgets: ``python -m benchmarks.memory``.

For every length, plain autograd, checkpointing, streaming, and streaming with offload, each in a
process of its own, beside what `fxmem.plan_for` says of it before anything runs. Then random
budgets between the least that a step takes and what plain autograd takes: the measured peak must
stay below each, and more memory should not be slower.

Peak: live tensor bytes, weights and gradients included. No optimizer steps.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import fxmem
from benchmarks.setups import SETUPS
from benchmarks.stream import Case, line, machine, measure, short_name
from benchmarks.stream import Options as Runs
from fxmem.demo.fetch import smollm2
from fxmem.demo.models import RANDOM, SMOLLM2, TINY, load_model, resolve
from fxmem.measure.subprocess_job import OK
from fxmem.optional import require

SETUP = {
    "plain autograd": "plain", "checkpointing": "checkpoint", "stream": "fxmem",
    "stream + offload": "fxmem:offload=disk",
}  # fmt: skip
"""Of the benchmark, by the name of a forecast's method."""
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What to run; ``budgets`` per length."""

    model: str = TINY
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    budgets: int = 20
    steps: int = 3
    threads: int = 2
    seed: int = 0
    out: Path = Path("benchmarks/results")


def forecast(model: str, length: int) -> fxmem.Forecast:
    """For a training loop without states of an optimizer."""
    given = load_model(model) if model in RANDOM else model
    limit = psutil.virtual_memory().total
    return fxmem.plan_for(given, memory=limit, length=length, optimizer="sgd", device="cpu")


def run(options: Options) -> Iterator[dict[str, Any]]:
    """A record per process: predicted and measured bytes and seconds."""
    model = resolve(str(smollm2(say=print)) if options.model == SMOLLM2 else options.model)
    runs = Runs(model=model, steps=options.steps, threads=options.threads)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="fxmem-benchmark-") as scratch:
        for number, length in enumerate(options.lengths):
            ids = ("fresh", "view")[number % 2]

            def one(setup: str, **more: Any) -> dict[str, Any]:
                case = Case(1, length, "sft", setup, ids)  # noqa: B023
                record = {**vars(case), **more}
                record |= measure(case, runs, model, Path(scratch), lambda _: None)
                if record["status"] == OK:
                    record["peak"] += record["parameters"]
                print(line(record), flush=True)
                return record

            found = {r.method: r for r in forecast(model, length).rows if r.optimizer == "sgd"}
            for method, row in found.items():
                if row.bytes < 0.8 * psutil.virtual_memory().available:
                    yield one(
                        SETUP[method], predicted=row.bytes, expected=row.seconds, away=row.away
                    )
            least, most = found["stream"].bytes, found["plain autograd"].bytes
            for _ in range(options.budgets):
                budget = int(least + (most - least) * draw.random()) + 4 * MIB
                yield one(f"fxmem:memory={budget}", budget=budget)


COLUMNS = "| tokens | | predicted MiB | measured MiB | | s | expected s | away MiB |\n"
COLUMNS += "|--:|---|--:|--:|--:|--:|--:|--:|"


def markdown(records: Sequence[dict[str, Any]], title: str) -> str:
    """Two tables: what was predicted, and budgets in ascending order."""
    lines = [f"# {title}", "", (__doc__ or "").split("\n\n", 1)[1].strip(), "", COLUMNS]
    for r in (r for r in records if "predicted" in r and r["status"] == OK):
        share = r["predicted"] / r["peak"]
        lines.append(
            f"| {r['length']} | {SETUPS[r['setup']].label} | {r['predicted'] / MIB:.0f} "
            f"| {r['peak'] / MIB:.0f} | {share:.3f} | {r['median_seconds']:.2f} "
            f"| {r['expected']:.2f} | {r['away'] / MIB:.0f} |"
        )
    lines += ["", "| tokens | budget MiB | measured MiB | | s |", "|--:|--:|--:|--:|--:|"]
    given = [r for r in records if "budget" in r and r["status"] == OK]
    for r in sorted(given, key=lambda r: (r["length"], r["budget"])):
        lines.append(
            f"| {r['length']} | {r['budget'] / MIB:.0f} | {r['peak'] / MIB:.0f} "
            f"| {r['peak'] / r['budget']:.3f} | {r['median_seconds']:.2f} |"
        )
    failed = [r for r in records if r["status"] != OK]
    lines += ["", *(f"- {r['length']} {r['setup']}: {r['reason']}" for r in failed)]
    return "\n".join(lines).rstrip() + "\n"


def draw(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Time against memory, one panel per length."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    worked = [r for r in records if r["status"] == OK]
    if not worked:
        return
    lengths = sorted({r["length"] for r in worked})
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(4.6 * len(lengths), 4), squeeze=False, layout="constrained"
    )
    for panel, length in zip(axes[0], lengths, strict=True):
        here = [r for r in worked if r["length"] == length]
        budgets = sorted((r for r in here if "budget" in r), key=lambda r: r["budget"])
        for key, style in (("budget", "#d8dee4"), ("peak", "#00798c")):
            panel.plot(
                [r[key] / MIB for r in budgets], [r["median_seconds"] for r in budgets],
                "o-", color=style, ms=4, label={"budget": "budget", "peak": "measured"}[key],
            )  # fmt: skip
        for r in (r for r in here if "predicted" in r):
            panel.plot(r["peak"] / MIB, r["median_seconds"], "s", color="#d1495b", ms=5)
            at = (r["peak"] / MIB, r["median_seconds"])
            panel.annotate(SETUPS[r["setup"]].label, at, (4, 4), textcoords="offset points",
                           fontsize=8)  # fmt: skip
        panel.spines[["top", "right"]].set_visible(False)
        panel.set(title=f"{length} tokens", xlabel="peak of a step, MiB", ylim=(0, None))
    axes[0][0].set_ylabel("seconds per step")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report after every process."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    table, picture, raw = (
        options.out / f"memory-{short_name(options.model)}.{end}" for end in ("md", "png", "json")
    )
    title = f"{short_name(options.model)}, float32, {options.threads} threads"
    records: list[dict[str, Any]] = []
    for record in run(options):
        records.append({k: v for k, v in record.items() if k != "timeline"})
        data = {"options": {**vars(options), "out": None}, "machine": machine()}
        raw.write_text(json.dumps({**data, "records": records}, indent=1))
        table.write_text(markdown(records, title))
    draw(records, picture, title)
    print(table.read_text())
    return int(any(r["status"] != OK or r.get("budget", r["peak"]) < r["peak"] for r in records))


def parse(arguments: Sequence[str] | None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    plain, add = Options(), parser.add_argument
    add("--model", default=plain.model, help=", ".join(RANDOM) + ", smollm2, a folder or a hub id")
    add("--lengths", type=int, nargs="+", default=plain.lengths)
    add("--budgets", type=int, default=plain.budgets, help="random budgets per length")
    add("--steps", type=int, default=plain.steps, help="timed, after one more; 0: memory alone")
    add("--threads", type=int, default=plain.threads)
    add("--seed", type=int, default=plain.seed)
    add("--out", type=Path, default=plain.out)
    given = vars(parser.parse_args(arguments))
    return Options(**{**given, "lengths": tuple(given["lengths"])})


if __name__ == "__main__":
    sys.exit(main())
