"""Block training side by side: ``python -m benchmarks.blocks`` in the repository root.

Three parts, every figure from a process of its own. ``time``: seconds per step over a pass of all
blocks, setups one after the other in each repeat and compared within it. ``memory``: peaks of a
step while the first block is active, which saves most. ``learning``: held-out loss on real text.
Records of parts and setups that do not run again stay in the result file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.blocks_report import line, write
from benchmarks.blocks_setups import SETUPS, Rates, missing
from benchmarks.stream import machine, short_name
from fxmem.demo.fetch import smollm2
from fxmem.demo.models import SMOLLM2, TINY, resolve
from fxmem.errors import FxmemError
from fxmem.measure.subprocess_job import run_isolated
from fxmem.optional import require

PARTS = ("time", "memory", "learning")


@dataclass(frozen=True)
class Options:
    """What to run; ``length`` is of the time and memory parts, ``window`` of the learning part."""

    model: str = TINY
    data: str | None = None
    parts: tuple[str, ...] = PARTS
    setups: tuple[str, ...] = tuple(SETUPS)
    length: int = 256
    repeats: int = 1
    steps: int = 4
    threads: int = 2
    layers_per_block: int = 1
    window: int = 128
    batch: int = 1
    learn_steps: int = 12
    visit: int = 2
    every: int = 4
    held_out: int = 4
    seeds: tuple[int, ...] = (0,)
    append: bool = False
    rates: Rates = field(default_factory=Rates)
    out: Path = Path("benchmarks/results")


@dataclass(frozen=True)
class Case:
    """One process."""

    part: str
    setup: str
    repeat: int = 0
    seed: int = 0


def cases(options: Options) -> Iterator[Case]:
    """In the order of running; the order of setups turns from repeat to repeat."""
    for part in options.parts:
        for i in range({"time": options.repeats, "learning": len(options.seeds)}.get(part, 1)):
            turn = i % len(options.setups)
            for setup in options.setups[turn:] + options.setups[:turn]:
                if part == "learning":
                    if setup != "adamw+checkpoint":  # learns as plain AdamW does
                        yield Case(part, setup, i, options.seeds[i])
                else:
                    yield Case(part, setup, i)


def request(case: Case, options: Options, model: str) -> dict[str, Any]:
    """What the worker gets."""
    learns = case.part == "learning"
    return {
        "part": case.part, "setup": case.setup, "seed": case.seed, "model": model,
        "data": options.data and str(Path(options.data).resolve()),
        "length": options.window if learns else options.length,
        "steps": options.learn_steps if learns else options.steps,
        "threads": options.threads, "layers_per_block": options.layers_per_block,
        "batch": options.batch, "visit": options.visit, "every": options.every,
        "held_out": options.held_out, "rates": asdict(options.rates),
    }  # fmt: skip


def run(options: Options) -> list[dict[str, Any]]:
    """Run every case; results are on disk after each, so an interrupted run is not lost."""
    model = resolve(str(smollm2(say=print)) if options.model == SMOLLM2 else options.model)
    bars = require("rich.progress")
    records = kept(options)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    with bars.Progress(transient=True) as progress:
        for case in cases(options):
            task = progress.add_task(f"{case.part} {SETUPS[case.setup].label}", total=None)

            def show(message: dict[str, Any], task: Any = task) -> None:
                if message.get("event") == "step":
                    progress.update(task, completed=message["step"], total=message["of"])

            record = {**vars(case), "run": began, **measure(case, options, model, show)}
            progress.remove_task(task)
            records.append(record)
            progress.console.print(line(record), highlight=False, soft_wrap=True)
            save(records, options)
    return records


def measure(case: Case, options: Options, model: str, show: Any) -> dict[str, Any]:
    """One process, unless the setup cannot run."""
    about = {"length": options.window if case.part == "learning" else options.length}
    if (reason := missing(SETUPS[case.setup])) is not None:
        return {**about, "status": "not installed", "reason": reason}
    if case.setup == "badam" and options.layers_per_block != 1:
        return {**about, "status": "not applicable", "reason": "badam has one layer per block"}
    wanted = request(case, options, model)
    result = run_isolated("benchmarks.blocks_worker", wanted, show, threads=options.threads)
    if case.part == "learning":
        about |= {"rates": asdict(options.rates)}
    return {**about, **result}


def kept(options: Options) -> list[dict[str, Any]]:
    """Records of an earlier run that this one does not replace; times are replaced together,
    unless ``append`` keeps them: they are compared within a run only.
    """
    path = result_file(options)
    if not path.exists():
        return []
    found = json.loads(path.read_text())["records"]

    def stays(record: dict[str, Any]) -> bool:
        if record["part"] not in options.parts:
            return True
        if record["part"] == "time":
            return options.append
        return record["setup"] not in options.setups

    return [r for r in found if stays(r)]


def result_file(options: Options) -> Path:
    return options.out / f"blocks-{short_name(options.model)}.json"


def save(records: Sequence[dict[str, Any]], options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    path = result_file(options)
    before = json.loads(path.read_text())["options"] if path.exists() else {}
    own = {**asdict(options), "out": None, "model": short_name(options.model)}
    own["data"] = options.data and Path(options.data).name
    data = {
        "options": {**before, **dict.fromkeys(options.parts, own)},
        "machine": machine(),
        "records": list(records),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report."""
    options = parse(arguments)
    try:
        run(options)
    except FxmemError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    for path in write(json.loads(result_file(options).read_text()), result_file(options)):
        print(path)
    return 0


def parse(arguments: Sequence[str] | None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__)
    plain, add = Options(), parser.add_argument
    add("--model", default=plain.model, help="tiny, smollm2, a folder or a hub id")
    add("--data", default=None, help="text or .jsonl; default: Python's own reference topics")
    add("--parts", nargs="+", choices=PARTS, default=plain.parts)
    add("--setups", nargs="+", choices=tuple(SETUPS), default=plain.setups)
    add("--seeds", type=int, nargs="+", default=plain.seeds)
    add("--out", type=Path, default=plain.out)
    add("--append", action="store_true", help="keep earlier times beside the new ones")
    counts = [f.name for f in fields(Options) if f.type == "int"]
    for name in counts:
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(plain, name))
    for f in fields(Rates):
        flag = f"--{f.name.replace('_', '-')}-lr"
        add(flag, type=float, default=getattr(plain.rates, f.name), dest=f"rate_{f.name}")
    given = vars(parser.parse_args(arguments))
    rates = replace(plain.rates, **{f.name: given.pop(f"rate_{f.name}") for f in fields(Rates)})
    tuples = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    options = Options(**{**given, **tuples, "rates": rates})
    if min(getattr(options, name) for name in counts) < 1:
        parser.error("counts start at 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
