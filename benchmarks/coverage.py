"""The coverage table: every model type of the installed transformers, each in its own process.

``python -m benchmarks.coverage`` runs what is not yet in ``benchmarks/results/coverage.jsonl`` and
writes ``docs/coverage.md``. ``--kinds causal,masked`` and ``--types llama,t5`` choose, ``--again``
runs these anew, ``--seconds`` is the limit of one type, in seconds of a processor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import track

from benchmarks import coverage_case
from benchmarks.coverage_case import CHUNK, KINDS, TOLERANCE, types
from fxmem.files import write_text

ROOT = Path(__file__).parent.parent
RESULTS, TABLE = ROOT / "benchmarks/results/coverage.jsonl", ROOT / "docs/coverage.md"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--types", default="", help="model types, by comma; default: all")
    parser.add_argument("--again", action="store_true", help="run what has a result, too")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="limit of one type, of a processor"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    rows = read(options.results)
    wanted = [name for name in options.types.split(",") if name]
    todo = [
        (kind, name) for kind in options.kinds.split(",") for name in types(kind)
        if (not wanted or name in wanted) and (options.again or (kind, name) not in rows)
    ]  # fmt: skip
    for kind, name in track(todo, "model types", console=Console(stderr=True)):
        row = {"kind": kind, "type": name, **run(kind, name, options.seconds)}
        rows[kind, name] = row
        with options.results.open("a") as file:
            print(json.dumps(row), file=file)
        write_text(options.table, table(rows.values()))  # what is found stays if the run is stopped
        print(f"{kind} {name}: {row['status']} {row.get('reason', '')}", flush=True)
    write_text(options.table, table(rows.values()))


def read(results: Path) -> dict[tuple[str, str], Row]:
    """The latest result of every type."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {(row["kind"], row["type"]): row for row in map(json.loads, lines)}


def run(kind: str, name: str, seconds: float) -> Row:
    """One type in a process of its own, forked from one that has imported everything."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["benchmarks.coverage_case"])
    rows, sends = forks.Pipe(duplex=False)
    process = forks.Process(target=coverage_case.run, args=(kind, name, sends, seconds))
    process.start()
    sends.close()  # so that the end of the process is the end of the rows
    known: Row = {}
    with contextlib.suppress(EOFError):
        while True:
            known = rows.recv()
    process.join()
    if known:  # or only the peaks are missing
        return known
    if process.exitcode == -signal.SIGXCPU:
        return {"status": "out of time", "reason": f"more than {seconds:.0f} s"}
    return {"status": "died", "reason": f"exit {process.exitcode}"}


def table(rows: Iterable[Row]) -> str:
    """The page."""
    found = sorted(rows, key=lambda r: (list(KINDS).index(r["kind"]), r["type"]))
    parts = [
        "# Coverage\n",
        f"Model types of transformers {transformers.__version__} in small random configurations "
        f"(`python -m benchmarks.coverage`): one step at two lengths, one batch padded on the "
        f"left, in float64, with chunks of {CHUNK} tokens. *Exact*: loss and every gradient within "
        f"{TOLERANCE:g} of plain PyTorch. *Whole*: operators that do not stream, and modules that "
        "run as they are, in newer rows with the line that is the reason. *Exact, to "
        "torch.compile*: the model's code asks whether it is compiled, and plain PyTorch has "
        "another loss than its `torch.compile`. *Bytes*: the peak of a step of 128 tokens against "
        "checkpointing every layer; at this size weights and chunks weigh more than in a real "
        "model. Types that are not here have not been run.\n",
    ]
    for kind in KINDS:
        own = [r for r in found if r["kind"] == kind]
        if own:
            parts += [f"## {kind.capitalize()}\n", _summary(own), "", _lines(own), ""]
    return "\n".join(parts)


def _summary(rows: Sequence[Row]) -> str:
    counts = Counter(r["status"] for r in rows)
    trains = [r for r in rows if "plain" not in r["status"]]
    free = sum(r["status"] == "exact" and not r["barriers"] and not r["pieces"] for r in trains)
    words = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    return (
        f"{len(rows)} of {len(types(rows[0]['kind']))} types: {words}. Exact with nothing whole: "
        f"{free} of {len(trains)}."
    )


def _lines(rows: Sequence[Row]) -> str:
    head = ["| Type | Result | Whole | Bytes |", "|---|---|---|---|"]
    return "\n".join([*head, *map(_cells, rows)])


def _cells(row: Row) -> str:
    whole = [*(f"`{op}`" for op in row.get("barriers", ())), *_pieces(row)]
    ratio = f"{row['streamed'] / row['checkpointed']:.2f}" if "streamed" in row else ""
    reason = row.get("reason", "").replace("|", "\\|").replace("<", "&lt;")
    result = f"{row['status']}: {reason}" if reason else row["status"]
    return f"| {row['type']} | {result} | {', '.join(whole)} | {ratio} |"


def _pieces(row: Row) -> list[str]:
    """How many modules run as they are, and why."""
    count = row.get("pieces", 0)
    why = "; ".join(row.get("reasons", ())).replace("|", "\\|")
    return [f"{count} module{'s' * (count > 1)}{f' ({why})' * bool(why)}"] if count else []


if __name__ == "__main__":
    main()
