"""Training memory and time, side by side: ``python -m benchmarks.stream`` in the repository root.

Every figure comes from a fresh process. A repeat runs all setups one after the other, so setups are
compared under the same load; figures are medians over repeats, and times are also given relative to
checkpointing in the same repeat (to the first setup where that does not run). With ``--by-turns``
the processes of a repeat live together and make one step each in turn, for differences of a few
percent. Peak: live tensor bytes above the parameters, gradients included.

Ids are a view (a slice of a longer text) in every second group of runs, else a tensor of their own;
with ``--ids both`` every setup runs with either, and the table has the ratio of their times.

The first step is that of a machine that has never traced the model. ``FXMEM_REGIONS=on`` in the
environment lets processes find what earlier ones have traced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.objectives import OBJECTIVES
from benchmarks.report import write
from benchmarks.setups import DEFAULT, SETUPS, why_not
from benchmarks.turns import Turns
from fxmem.demo.fetch import smollm2
from fxmem.demo.models import RANDOM, SMOLLM2, TINY, resolve
from fxmem.errors import FxmemError
from fxmem.measure.subprocess_job import OK, run_isolated
from fxmem.measure.training_run import largest_difference

SOME = ", or such as fxmem:memory=2GB,offload=disk"


@dataclass(frozen=True)
class Options:
    """What to run; lengths are tokens in all rows together."""

    model: str = TINY
    lengths: tuple[int, ...] = (3072,)
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    setups: tuple[str, ...] = DEFAULT
    repeats: int = 3
    steps: int = 3
    threads: int = 2
    chunk: int | Literal["auto"] = "auto"
    by_turns: bool = False
    ids: Literal["alternate", "fresh", "view", "both"] = "alternate"
    out: Path = Path("benchmarks/results")


@dataclass(frozen=True)
class Case:
    """One measurement."""

    repeat: int
    length: int
    objective: str
    setup: str
    ids: str = "fresh"

    @property
    def name(self) -> str:
        """Different for all cases of a group."""
        return f"{self.setup}-{self.ids}-{self.objective}"


def cases(options: Options) -> Iterator[Case]:
    """In the order of running; the setups' order turns by one from repeat to repeat."""
    kinds = (options.ids,) if options.ids in ("fresh", "view") else ("fresh", "view")
    group = 0
    for repeat in range(options.repeats):
        # The first repeat starts with the first setup, whose gradients the others are held to.
        turn = repeat % len(options.setups)
        ordered = options.setups[turn:] + options.setups[:turn]
        for length, objective in product(options.lengths, options.objectives):
            now = kinds if options.ids == "both" else (kinds[group % len(kinds)],)
            group += 1
            for setup, ids in product(ordered, now):
                yield Case(repeat, length, objective, setup, ids)


def run(options: Options) -> list[dict[str, Any]]:
    """Measure every case; results are on disk after each, so an interrupted run is not lost."""
    model = resolve(str(smollm2(say=print)) if options.model == SMOLLM2 else options.model)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fxmem-benchmark-") as scratch:
        for together in groups(options):
            for record in measure_group(together, options, model, Path(scratch)):
                records.append(record)
                print(line(record), flush=True)
                save(records, options)
    return records


def groups(options: Options) -> Iterator[list[Case]]:
    """Cases that are measured together: by turns all setups of a repeat, else one."""
    count = len(options.setups) if options.by_turns else 1
    count *= 2 if options.by_turns and options.ids == "both" else 1
    everything = list(cases(options))
    for first in range(0, len(everything), count):
        yield everything[first : first + count]


def measure_group(
    together: Sequence[Case], options: Options, model: str, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Records in the order of the cases; each has a process of its own, and one works at a time."""
    turns = Turns([case.name for case in together])

    def work(case: Case) -> dict[str, Any]:
        turns.take(case.name)
        try:
            figures = measure(case, options, model, scratch, lambda _: turns.pass_on(case.name))
            return {**vars(case), **figures}
        finally:
            turns.leave(case.name)

    with ThreadPoolExecutor(len(together)) as pool:
        yield from pool.map(work, together)


def measure(
    case: Case, options: Options, model: str, scratch: Path, pause: Callable[[Any], None]
) -> dict[str, Any]:
    """One process, unless the setup cannot run the objective; ``pause`` is called between steps."""
    setup = SETUPS[case.setup]
    reason = why_not(setup, case.objective)
    if reason is not None:
        return {"status": "not applicable", "reason": reason}
    reference = scratch / f"{case.objective}-{case.length}.pt"
    first = case.setup == "plain" and not reference.exists()
    gradients = reference if first else scratch / f"{case.name}.pt"
    request = {
        "model": model,
        "setup": case.setup,
        "objective": case.objective,
        "length": case.length,
        "ids": case.ids,
        "steps": options.steps,
        "threads": options.threads,
        "chunk": options.chunk,
        "gradients": str(gradients) if case.repeat == 0 else None,
    }
    result = run_isolated(
        "benchmarks.worker", request, pause, options.threads, in_step=options.by_turns
    )
    if result["status"] == OK and case.repeat == 0 and gradients != reference:
        if reference.exists():
            worst = largest_difference(reference, gradients)
            result["difference"], result["difference_at"] = worst
        gradients.unlink()
    return result


def line(record: dict[str, Any]) -> str:
    """One line of progress."""
    name = f"repeat {record['repeat'] + 1}  {record['length']:>6} {record['objective']:<14}"
    name += f"{SETUPS[record['setup']].label:<38}{record['ids']:<6}"
    if record["status"] != OK:
        return f"{name} {record['reason'][:120]}"
    peak, seconds = record["peak"] / 2**20, record["median_seconds"]
    return f"{name} {peak:8.1f} MiB {1000 * seconds:8.0f} ms"


def save(records: Sequence[dict[str, Any]], options: Options) -> None:
    """All records as JSON, without the curves of later repeats."""
    options.out.mkdir(parents=True, exist_ok=True)
    kept = [
        {key: value for key, value in record.items() if key != "timeline" or not record["repeat"]}
        for record in records
    ]
    data = {"options": {**vars(options), "out": None}, "machine": machine(), "records": kept}
    path = options.out / f"stream-{short_name(options.model)}.json"
    path.write_text(json.dumps(data, indent=1))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        # Threads that sleep while they wait cost programs of many operators more than others.
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }


def short_name(model: str) -> str:
    """A file name for a model."""
    return Path(model).name or "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report."""
    options = parse(arguments)
    os.environ.setdefault("FXMEM_REGIONS", "off")
    try:
        records = run(options)
    except FxmemError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    title = f"{short_name(options.model)}, float32, {options.threads} threads"
    for path in write(records, options.out, f"stream-{short_name(options.model)}", title):
        print(path)
    return 0


def _setup(name: str) -> str:
    try:
        SETUPS[name]
    except KeyError:
        raise argparse.ArgumentTypeError(f"no setup {name!r}; one of {', '.join(SETUPS)}") from None
    return name


def parse(arguments: Sequence[str] | None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    plain, add = Options(), parser.add_argument
    add(
        "--model",
        default=plain.model,
        help=", ".join(RANDOM) + ", smollm2, a folder or a hub id",
    )
    add("--lengths", type=int, nargs="+", default=plain.lengths)
    add("--objectives", nargs="+", choices=tuple(OBJECTIVES), default=plain.objectives)
    add("--setups", nargs="+", type=_setup, default=plain.setups, help=", ".join(SETUPS) + SOME)
    add("--repeats", type=int, default=plain.repeats)
    add("--steps", type=int, default=plain.steps, help="timed, after one more; 0: memory alone")
    add("--threads", type=int, default=plain.threads)
    add("--chunk", type=lambda text: "auto" if text == "auto" else int(text), default=plain.chunk)
    add("--ids", choices=("alternate", "fresh", "view", "both"), default=plain.ids)
    add("--by-turns", action="store_true", help="all setups of a repeat together, a step each")
    add("--out", type=Path, default=plain.out)
    given = vars(parser.parse_args(arguments))
    tuples = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    options = Options(**{**given, **tuples})
    least = min(
        options.repeats, options.steps + 1, options.threads, *(n // 4 for n in options.lengths)
    )
    if least < 1:
        parser.error("repeats and threads start at 1, steps at 0, lengths at 4")
    return options


if __name__ == "__main__":
    sys.exit(main())
